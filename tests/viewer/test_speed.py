"""Edits per minute and remaining time in the status line."""

import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.training.schedule import PhaseSchedule
from wys_nerfstudio.training.session import EditSession
from wys_nerfstudio.training.settings import Settings
from wys_nerfstudio.viewer.commands import CommandHandler, PipelineProtocol, TrainerProtocol
from wys_nerfstudio.viewer.panel import ViewerPanel
from wys_nerfstudio.viewer.speed import RECENT_INTERVALS, RecentSteps

STEPS = st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 3)), max_size=60)


@given(STEPS, st.integers(1, 5))
def test_speed_is_that_of_the_newest_steps(steps: list[tuple[float, int]], interval: int) -> None:
    recent = RecentSteps()
    for seconds, edits in steps:
        recent.add(seconds, edits, interval)
    kept = steps[max(0, len(steps) - RECENT_INTERVALS * interval) :]
    mean = recent.seconds_per_step()
    assert mean == (pytest.approx(sum(seconds for seconds, _ in kept) / len(kept)) if kept else None)
    while len(kept) % interval:
        kept = kept[1:]
    rate = recent.edits_per_minute(interval)
    assert (rate is None) == (not kept)
    if rate is not None:
        assert rate * sum(seconds for seconds, _ in kept) == pytest.approx(60 * sum(edits for _, edits in kept))


def test_a_regular_rate_does_not_depend_on_the_moment() -> None:
    recent, rates = RecentSteps(), []
    for step in range(60):
        recent.add(8.0 if step % 4 == 0 else 1.0, 1 if step % 4 == 0 else 0, 4)
        rates.append(recent.edits_per_minute(4))
    assert rates[:3] == [None] * 3 and rates[3:] == pytest.approx([60 / 11] * 57)


class Clock:
    """A clock that moves on request."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_status_line_shows_edits_per_minute_and_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(), []
    monkeypatch.setattr(time, "monotonic", clock)
    loop = SimpleNamespace(edits=0, skipped=0, paused=False)
    trainer = MagicMock(spec=TrainerProtocol, last_step=59, training_state="training")
    trainer.pipeline = MagicMock(spec=PipelineProtocol)
    trainer.pipeline.session = MagicMock(spec=EditSession, schedule=PhaseSchedule(20, 0, 40), edit_loop=loop)
    trainer.pipeline.settings = MagicMock(spec=Settings, current=SimpleNamespace(edit_every=5))
    trainer.pipeline.panel = MagicMock(spec=ViewerPanel)
    trainer.pipeline.panel.take.return_value = None
    trainer.pipeline.panel.show_status.side_effect = lambda progress, message: shown.append(progress)
    handler = CommandHandler(trainer)

    def status(step: int, seconds: float) -> str:
        clock.now += seconds
        handler.run_commands(step)
        return shown[-1]

    status(-1, 0)
    for step in range(20):
        assert "edits/min" not in status(step, 1)
    assert shown[-1] == "reconstruct, step 20 of 60, 0 edits, 0:40 left"
    for step in range(20, 35):
        begins = step % 5 == 0
        loop.edits += 2 * begins
        loop.skipped += begins
        status(step, 6 if begins else 1)
    # An interval takes 10 s and edits one view; its other one is skipped.
    assert shown[-1] == "edit, step 35 of 60, 3 edits, 3 skipped, 6.0 edits/min, 0:50 left"
    trainer.training_state = "paused"
    for _ in range(10):
        status(34, 100)
    assert shown[-1] == "edit, step 35 of 60 (paused), 3 edits, 3 skipped, 6.0 edits/min, 0:50 left"
    loop.paused = True
    assert "edits/min" not in status(34, 1)
    trainer.last_step = 34
    assert status(34, 1) == "finished (paused), 3 edits, 3 skipped"
