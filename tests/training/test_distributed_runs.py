"""Real runs of two ranks on gloo, beside a run of one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import VIEWS, masks_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("distributed_runs.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script, folder], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def endings(runs: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((runs / "endings.json").read_text())[name]


def kept(runs: Path, folder: str) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in sorted((runs / folder).glob("rank-*.pt"))]


def edits(runs: Path, folder: str) -> list[dict[str, Any]]:
    (path,) = (runs / folder).glob("*/*/run/wys/edits.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second)


def test_two_ranks_come_to_their_end_and_hold_the_same_scene(runs):
    assert [ending["code"] for ending in endings(runs, "two")] == [0, 0], endings(runs, "two")
    first, second = kept(runs, "two")
    assert equal(first["weights"], second["weights"])
    assert equal(first["views"], second["views"]) and equal(first["relevance"], second["relevance"])


def test_every_edit_is_made_by_one_rank_and_known_to_all_after_each_round(runs):
    first, second = kept(runs, "two")
    assert len(first["rounds"]) == len(second["rounds"]) == 4
    for ours, theirs in zip(first["rounds"], second["rounds"]):
        assert torch.equal(ours, theirs)
    made = sorted(first["edited"] + second["edited"])
    assert first["edited"] and second["edited"]
    assert len(made) == len(set(made)) == len([edit for edit in edits(runs, "two") if edit["steps"]])
    assert [edit["edit"] for edit in edits(runs, "two")] == list(range(12))


def test_two_ranks_make_the_edits_that_one_makes(runs):
    named = [
        [(edit["edit"], edit["step"], edit["view"], edit["time"]) for edit in edits(runs, n)] for n in ("one", "two")
    ]
    assert named[0] == named[1]


def test_maps_are_split_between_the_ranks_and_equal_those_of_one(runs):
    first, second = kept(runs, "two")
    assert sorted(first["maps"] + second["maps"]) == list(range(VIEWS))
    assert abs(len(first["maps"]) - len(second["maps"])) == 1
    (alone,) = kept(runs, "one")
    torch.testing.assert_close(first["relevance"], alone["relevance"], atol=1e-4, rtol=0)


def test_gradients_are_averaged_over_different_rays(runs):
    (alone,), (first, _) = kept(runs, "one"), kept(runs, "two")
    assert not equal(alone["weights"], first["weights"])


def test_ctrl_c_stops_all_ranks_at_one_step_and_the_run_goes_on_exactly(runs):
    stopped = endings(runs, "stopped")
    assert [ending["code"] for ending in stopped] == [130, 130], stopped
    assert "wys: Stopped after step 9; to go on" in stopped[0]["said"] and "wys:" not in stopped[1]["said"]
    assert [ending["code"] for ending in endings(runs, "resumed")] == [0, 0], endings(runs, "resumed")
    for whole, resumed in zip(kept(runs, "two"), kept(runs, "stopped")):
        assert equal(whole["weights"], resumed["weights"]) and equal(whole["views"], resumed["views"])
    assert masks_of(runs / "two") == masks_of(runs / "stopped")


def test_a_rank_that_dies_ends_the_run_with_a_sentence_and_the_run_goes_on_exactly(runs):
    left, gone = endings(runs, "died")
    assert gone["code"] == 9 and left["code"] == 1
    assert "wys: Of the 2 processes that train this scene another one seems to have ended" in left["said"]
    assert "Traceback" not in left["said"]
    for whole, revived in zip(kept(runs, "two"), kept(runs, "died")):
        assert equal(whole["weights"], revived["weights"]) and equal(whole["views"], revived["views"])


def test_an_instruction_applied_in_the_viewer_reaches_all_ranks(runs):
    assert [ending["code"] for ending in endings(runs, "applied")] == [0, 0], endings(runs, "applied")
    first, second = kept(runs, "applied")
    assert [entry["instruction"] for entry in second["history"]] == ["make the ball blue", "make the bear red"]
    assert len(first["rounds"]) == 8
    assert equal(first["weights"], second["weights"]) and equal(first["views"], second["views"])


def test_what_is_undone_is_undone_on_all_ranks(runs):
    assert [ending["code"] for ending in endings(runs, "undone")] == [0, 0], endings(runs, "undone")
    for whole, undone in zip(kept(runs, "two"), kept(runs, "undone")):
        assert [entry["instruction"] for entry in undone["history"]] == ["make the ball blue"]
        assert equal(whole["weights"], undone["weights"]) and equal(whole["views"], undone["views"])
