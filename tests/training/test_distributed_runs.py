"""Runs of two ranks with gloo, compared with a run of one rank."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import VIEWS, read_masks

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


def records(runs: Path, folder: str) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in sorted((runs / folder).glob("rank-*.pt"))]


def edits(runs: Path, folder: str) -> list[dict[str, Any]]:
    (path,) = (runs / folder).glob("*/*/run/wys/edits.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return bool(first == second)


def test_two_ranks_finish_with_the_same_scene(runs):
    assert [ending["code"] for ending in endings(runs, "two")] == [0, 0], endings(runs, "two")
    first, second = records(runs, "two")
    assert equal(first["weights"], second["weights"])
    assert equal(first["views"], second["views"]) and equal(first["relevance"], second["relevance"])


def test_each_edit_is_computed_by_one_rank_and_shared_with_all(runs):
    first, second = records(runs, "two")
    assert len(first["rounds"]) == len(second["rounds"]) == 4
    for views_of_first, views_of_second in zip(first["rounds"], second["rounds"]):
        assert torch.equal(views_of_first, views_of_second)
    edited = sorted(first["edited"] + second["edited"])
    assert first["edited"] and second["edited"]
    assert len(edited) == len(set(edited)) == len([edit for edit in edits(runs, "two") if edit["steps"]])
    assert [edit["edit"] for edit in edits(runs, "two")] == list(range(12))


def test_two_ranks_make_the_same_edits_as_one(runs):
    one, two = (
        [(edit["edit"], edit["step"], edit["view"], edit["time"]) for edit in edits(runs, name)]
        for name in ("one", "two")
    )
    assert one == two


def test_maps_are_sharded_and_equal_those_of_one_rank(runs):
    first, second = records(runs, "two")
    assert sorted(first["maps"] + second["maps"]) == list(range(VIEWS))
    assert abs(len(first["maps"]) - len(second["maps"])) == 1
    (alone,) = records(runs, "one")
    torch.testing.assert_close(first["relevance"], alone["relevance"], atol=1e-4, rtol=0)


def test_gradients_are_averaged_over_different_rays(runs):
    (alone,), (first, _) = records(runs, "one"), records(runs, "two")
    assert not equal(alone["weights"], first["weights"])


def test_interrupted_ranks_stop_at_one_step_and_resume_exactly(runs):
    stopped = endings(runs, "stopped")
    assert [ending["code"] for ending in stopped] == [130, 130], stopped
    assert "wys: Stopped after step 9; to resume" in stopped[0]["output"] and "wys:" not in stopped[1]["output"]
    assert [ending["code"] for ending in endings(runs, "resumed")] == [0, 0], endings(runs, "resumed")
    for whole, resumed in zip(records(runs, "two"), records(runs, "stopped")):
        assert equal(whole["weights"], resumed["weights"]) and equal(whole["views"], resumed["views"])
    assert read_masks(runs / "two") == read_masks(runs / "stopped") != {}


def test_a_lost_rank_ends_the_run_and_it_resumes_exactly(runs):
    survivor, lost = endings(runs, "died")
    assert lost["code"] == 9 and survivor["code"] == 1
    assert "wys: Another of the 2 processes that train this scene seems to have ended" in survivor["output"]
    assert "Traceback" not in survivor["output"]
    assert [ending["code"] for ending in endings(runs, "restarted")] == [0, 0], endings(runs, "restarted")
    for whole, restarted in zip(records(runs, "two"), records(runs, "died")):
        assert equal(whole["weights"], restarted["weights"]) and equal(whole["views"], restarted["views"])


def test_a_blocked_rank_ends_with_a_sentence_after_a_killed_one(runs):
    survivor, killed = endings(runs, "blocked")
    assert killed["code"] == -9 and survivor["code"] == 1
    assert "wys: Another of the 2 processes" in survivor["output"] and "Traceback" not in survivor["output"]


def test_an_instruction_applied_in_the_viewer_is_broadcast(runs):
    assert [ending["code"] for ending in endings(runs, "applied")] == [0, 0], endings(runs, "applied")
    first, second = records(runs, "applied")
    assert [entry["instruction"] for entry in second["history"]] == ["make the ball blue", "make the bear red"]
    assert len(first["rounds"]) == 8
    assert equal(first["weights"], second["weights"]) and equal(first["views"], second["views"])


def test_a_data_set_is_exported_by_rank_0(runs):
    assert len(list((runs / "undone").glob("*/*/*/export-14/transforms.json"))) == 1


def test_undo_is_broadcast(runs):
    assert [ending["code"] for ending in endings(runs, "undone")] == [0, 0], endings(runs, "undone")
    for whole, undone in zip(records(runs, "two"), records(runs, "undone")):
        assert [entry["instruction"] for entry in undone["history"]] == ["make the ball blue"]
        assert equal(whole["weights"], undone["weights"]) and equal(whole["views"], undone["views"])
