"""The state that a checkpoint holds beside the weights, and the log of edits."""

import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.training.edit_log import read_edit_lines
from wys_nerfstudio.training.run_state import SETTINGS_KEY, STATE_KEY, RunState, random_state, set_random_state
from wys_nerfstudio.training.schedule import PhaseSchedule
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.errors import WysError

ENTRY = {"instruction": "a", "start": "captured", "settings": {}, "first_step": 0, "snapshot": None}


def build_state() -> RunState:
    cli_settings = RunSettings('Turn it into "snow" – now', 0.5, 7.5, 1.5, "relevance-field", 10, 1)
    return RunState(
        step=1234,
        schedule=PhaseSchedule(1000, 200, 4000),
        settings=replace(cli_settings, mask_threshold=0.25),
        localized=True,
        cli_settings=cli_settings,
        edits=17,
        recorded=21,
        pending=[
            {
                "number": 16,
                "view": 0,
                "time": 300,
                "steps": 6,
                "mask": torch.ones(2, 3) > 0,
                "image": None,
                "seconds": 0.5,
            }
        ],
        views={
            "names": ["a"],
            "size": [2, 3],
            "pictures": ["0123"],
            "cameras": torch.zeros(1, 25),
            "edited": [0],
            "current": torch.zeros(1, 2, 3, 3),
            "reference": None,
        },
        history=[ENTRY],
        scene={"anneal": 0.5, "steps_since_update": 3, "step": 1234, "proposals_pretrained": False},
        lr_warmup_start=1200,
        random=[random_state()],
    )


def checkpoint_of(state: RunState) -> dict:
    """Return a checkpoint as a run saves it: settings beside the weights, the rest under its own key."""
    extra_state = {"settings": state.settings.as_dict(), "localized": state.localized}
    return {"pipeline": {SETTINGS_KEY: extra_state}, STATE_KEY: state.data()}


def draws() -> list[float]:
    """Return draws from the generators of random, NumPy and torch."""
    numbers = torch.rand(3).tolist()
    return [random.random(), random.gauss(0, 1), *np.random.rand(3).tolist(), np.random.randn(), *numbers]


def test_the_weights_only_loader_restores_the_state(tmp_path):
    written = build_state()
    random.gauss(0, 1), np.random.randn()  # both generators now cache a second normal draw
    written.random = [random_state()]
    expected = draws()
    torch.save(checkpoint_of(written), tmp_path / "x.ckpt")
    read = RunState.from_checkpoint(torch.load(tmp_path / "x.ckpt", weights_only=True), tmp_path / "x.ckpt")
    random_of_rank = read.random_of_this_rank()
    assert random_of_rank is not None
    set_random_state(random_of_rank)
    assert draws() == expected != draws()
    assert read.pending[0].keys() == written.pending[0].keys()
    for name in (option.name for option in fields(RunState) if option.name not in ("pending", "views", "random")):
        assert getattr(read, name) == getattr(written, name), name


@pytest.mark.parametrize("typed", [{}, {"instruction": ""}, {"mask_threshold": 0.7}, {"edit_every": 3}])
def test_resumed_settings_keep_live_changes_unless_retyped(typed):
    saved = build_state()
    cli_settings = replace(saved.cli_settings, **typed)
    changes = {name: value for name, value in typed.items() if name != "instruction"}
    assert saved.resumed_settings(cli_settings) == replace(saved.settings, **changes)
    assert saved.resumed_cli_settings(cli_settings).instruction == saved.cli_settings.instruction


def test_resuming_with_another_instruction_is_refused():
    with pytest.raises(WysError, match="--base-run to apply another instruction"):
        build_state().resumed_settings(replace(build_state().cli_settings, instruction="make it snow"))


PARTS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
                     lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3),
                     max_leaves=5)  # fmt: skip


@given(part=PARTS, name=st.sampled_from(list(build_state().data())), drop=st.booleans())
def test_a_checkpoint_holds_a_valid_state_or_is_refused(part, name, drop):
    data = build_state().data()
    if drop:
        del data[name]
    else:
        data[name] = part
    pipeline = checkpoint_of(build_state())["pipeline"]
    for checkpoint in (
        {"pipeline": pipeline, STATE_KEY: data},
        {"pipeline": pipeline, STATE_KEY: part},
        {"pipeline": {SETTINGS_KEY: part}, STATE_KEY: build_state().data()},
        {"pipeline": {}, STATE_KEY: build_state().data()},
        {"pipeline": {}},
    ):
        try:
            read = RunState.from_checkpoint(checkpoint, Path("run/nerfstudio_models/step-000001234.ckpt"))
        except WysError as error:
            assert "cannot be resumed from" in str(error) and "--base-run" in str(error)
        else:
            assert isinstance(read.schedule.total_steps, int) and read.history[0]["start"] is not None
            assert read.settings.instruction and read.cli_settings.instruction


def test_a_state_without_a_part_of_the_views_is_refused():
    checkpoint = checkpoint_of(build_state())
    del checkpoint[STATE_KEY]["views"]["cameras"]
    with pytest.raises(WysError, match="cannot be resumed from"):
        RunState.from_checkpoint(checkpoint, Path("x.ckpt"))


@pytest.mark.parametrize("incomplete", [b"", b'{"ste', b"[]", b"\xff\xfe"])
def test_incomplete_edit_lines_are_ignored(tmp_path, incomplete):
    assert read_edit_lines(tmp_path) == []
    (tmp_path / "edits.jsonl").write_bytes(b'{"step": 1}\n\xff not UTF-8\n' + incomplete)
    assert read_edit_lines(tmp_path) == [b'{"step": 1}', b"\xff not UTF-8"]
