"""An editor on a device of its own works while training goes on. Here both are one CPU that passes for two devices."""

import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_ring_scene
from test_interrupts import Command, assert_equal_weights, interrupt

from wys_nerfstudio import pipeline
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.devices import same_device
from wys_nerfstudio.viewer.panel import ON_TOP, ViewerCommand


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [("cpu", "cpu", True), ("cuda", "cuda:0", True), ("cuda:1", "cuda:0", False), ("cpu", torch.device("cuda"), False)],
)
def test_a_device_is_known_by_all_its_names(first, second, same):
    assert same_device(first, second) is same


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("overlap") / "scene", width=16, height=12, views=4)


@pytest.fixture
def overlapped(scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch) -> Command:
    monkeypatch.setattr(pipeline, "same_device", lambda *_: False)
    return Command(scene, editor_folder, tmp_path / "overlapped", monkeypatch)


def edits(command: Command) -> list[dict]:
    return [json.loads(line) for line in (command.run / "wys" / "edits.jsonl").read_text().splitlines()]


def test_training_goes_on_while_the_editor_works(overlapped, monkeypatch):
    trained, edited = threading.Event(), WysDataManager.edit_views
    before: list[bool] = []

    def waits_for_training(*arguments, **named):
        before.append(trained.wait(60))
        trained.clear()
        return edited(*arguments, **named)

    monkeypatch.setattr(WysDataManager, "edit_views", waits_for_training)
    iteration = WysTrainer.train_iteration
    monkeypatch.setattr(WysTrainer, "train_iteration", lambda *a: (iteration(*a), trained.set())[0])
    assert overlapped("--mask-threshold=0") is None
    assert before and all(before)


def test_the_same_edits_are_made_and_each_is_in_place_when_the_next_are_due(overlapped, scene, editor_folder, tmp_path):
    assert overlapped("--mask-threshold=0") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "same_device", same_device)
        serial = Command(scene, editor_folder, tmp_path / "serial", patch)
        assert serial("--mask-threshold=0") is None
    ours, theirs = edits(overlapped), edits(serial)
    assert [(edit["edit"], edit["view"], edit["time"]) for edit in ours] == [
        (edit["edit"], edit["view"], edit["time"]) for edit in theirs
    ]
    assert [edit["step"] for edit in theirs] == [6, 8, 10]
    assert [edit["step"] for edit in ours] == [8, 10, 11]
    # The first edit starts from the same scene with the same noise, so it is the same picture; no later edit is of that view.
    first = ours[0]["view"]
    assert first not in [edit["view"] for edit in ours[1:]]
    pictures = [(run / "wys" / "edits" / f"{first}.png").read_bytes() for run in (overlapped.run, serial.run)]
    assert pictures[0] == pictures[1]


def test_a_run_that_is_stopped_while_the_editor_works_goes_on_as_if_nothing_had_happened(
    overlapped,
    scene,
    editor_folder,
    tmp_path,
    monkeypatch,
):
    whole = Command(scene, editor_folder, tmp_path / "whole", monkeypatch)
    assert whole("--mask-threshold=0") is None
    assert overlapped("--mask-threshold=0", at=9, happens=interrupt) == 130
    assert [edit["step"] for edit in edits(overlapped)] == [8]
    assert overlapped("--mask-threshold=0", "--load-dir", overlapped.run) is None
    assert_equal_weights(overlapped.weights(), whole.weights())
    assert [{**edit, "seconds": 0} for edit in edits(overlapped)] == [{**edit, "seconds": 0} for edit in edits(whole)]


def test_what_is_being_made_when_the_scene_is_taken_back_is_dropped(overlapped):
    def apply_and_undo(trainer: WysTrainer) -> None:
        for request in (
            ViewerCommand("apply", ON_TOP, "make the bear red"),
            ViewerCommand("undo"),
            ViewerCommand("reset"),
        ):
            trainer.pipeline.panel.commands.put(request)

    assert overlapped("--mask-threshold=0", at=10, happens=apply_and_undo) is None
    assert not (overlapped.run / "wys" / "edits").exists() or not list((overlapped.run / "wys" / "edits").iterdir())
