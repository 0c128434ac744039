"""The soak's short form: viewers come, apply, undo and leave while a real run trains. And its judge is not blind."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from soak import Sample, draw, growth, soak


def made_up(memory: Callable[[int], float], threads=lambda step: 9, files=lambda step: 8) -> list[Sample]:
    # Up and down with the phases, as a real run's.
    return [
        Sample(step, memory(step) + step % 40 / 4, threads(step) + (step % 60 == 0), files(step) + (step % 60 == 0))
        for step in range(1, 3001, 5)
    ]


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        (made_up(lambda step: 1000), None),
        (made_up(lambda step: 1000 if step > 700 else step, lambda step: 9 if step > 700 else 1), None),
        (made_up(lambda step: 1000 + 0.02 * step), None),
        (made_up(lambda step: 1000 + 0.05 * step), "memory grew by"),
        (made_up(lambda step: 1000, threads=lambda step: 9 + step // 60), "threads grew from"),
        (made_up(lambda step: 1000, files=lambda step: 8 + step // 60), "files grew from"),
    ],
    ids=["level", "warm-up", "small", "memory leaks", "a thread per client", "a file per client"],
)
def test_what_leaks_is_told_and_what_settles_is_not(samples: list[Sample], complaint: str) -> None:
    found = growth(samples).complaints()
    assert (complaint in found[0] and len(found) == 1) if complaint else not found


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    samples = soak(tmp_path, steps=90, clients=2)
    steps = [sample.step for sample in samples]
    assert steps == sorted(set(steps)) and steps[-1] >= 85
    found = growth(samples)
    assert found.memory < 0.05 and found.last.files <= found.first.files
    draw(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 5000
