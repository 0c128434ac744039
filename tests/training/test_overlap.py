"""Edits on a second device, computed while training continues; here one CPU is treated as two devices."""

import json
import threading
from pathlib import Path

import pytest
from conftest import write_ring_scene
from test_interrupts import TrainCommand, assert_equal_weights, interrupt

from wys_nerfstudio import pipeline
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.devices import has_own_device
from wys_nerfstudio.viewer.panel import ON_TOP, ViewerCommand


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("overlap") / "scene", width=20, height=16, views=4)


@pytest.fixture
def overlapped(scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch) -> TrainCommand:
    monkeypatch.setattr(pipeline, "has_own_device", lambda *_: True)
    return TrainCommand(scene, editor_folder, tmp_path / "overlapped", monkeypatch)


def edits(command: TrainCommand) -> list[dict]:
    """Return the edit log of the run."""
    return [json.loads(line) for line in (command.run / "wys" / "edits.jsonl").read_text().splitlines()]


def test_training_continues_while_views_are_edited(overlapped, monkeypatch):
    trained, edit_views, train_iteration = threading.Event(), WysDataManager.edit_views, WysTrainer.train_iteration
    trained_meanwhile: list[bool] = []

    def wait_for_training(*arguments, **named):
        trained_meanwhile.append(trained.wait(60))
        trained.clear()
        return edit_views(*arguments, **named)

    def train(*arguments):
        result = train_iteration(*arguments)
        trained.set()
        return result

    monkeypatch.setattr(WysDataManager, "edit_views", wait_for_training)
    monkeypatch.setattr(WysTrainer, "train_iteration", train)
    assert overlapped("--mask-threshold=0") is None
    assert trained_meanwhile and all(trained_meanwhile)


def test_edits_are_those_of_a_serial_run_committed_one_later(overlapped, scene, editor_folder, tmp_path):
    assert overlapped("--mask-threshold=0") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "has_own_device", has_own_device)
        serial = TrainCommand(scene, editor_folder, tmp_path / "serial", patch)
        assert serial("--mask-threshold=0") is None
    overlapped_edits, serial_edits = edits(overlapped), edits(serial)
    assert [(edit["edit"], edit["view"], edit["time"]) for edit in overlapped_edits] == [
        (edit["edit"], edit["view"], edit["time"]) for edit in serial_edits
    ]
    assert [edit["step"] for edit in serial_edits] == [6, 8, 10]
    assert [edit["step"] for edit in overlapped_edits] == [8, 10, 11]
    # The first edit starts from the same scene and noise in both runs; no later edit replaces its view.
    first = serial_edits[0]["view"]
    assert first not in [edit["view"] for edit in serial_edits[1:]]
    files = [run / "wys" / "edits" / f"{first}.png" for run in (overlapped.run, serial.run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_stopped_during_an_edit_resumes_equal(overlapped, scene, editor_folder, tmp_path, monkeypatch):
    reference = TrainCommand(scene, editor_folder, tmp_path / "reference", monkeypatch)
    assert reference("--mask-threshold=0") is None
    assert overlapped("--mask-threshold=0", step=9, action=interrupt) == 130
    assert [edit["step"] for edit in edits(overlapped)] == [8]
    assert overlapped("--mask-threshold=0", "--load-dir", overlapped.run) is None
    assert_equal_weights(overlapped.weights(), reference.weights())
    timeless = [[{**edit, "seconds": 0} for edit in edits(command)] for command in (overlapped, reference)]
    assert timeless[0] == timeless[1]


def test_resetting_the_scene_discards_pending_edits(overlapped):
    def apply_and_undo(trainer: WysTrainer) -> None:
        apply = ViewerCommand("apply", ON_TOP, "make the bear red")
        for command in (apply, ViewerCommand("undo"), ViewerCommand("reset")):
            trainer.pipeline.panel.commands.put(command)

    assert overlapped("--mask-threshold=0", step=10, action=apply_and_undo) is None
    assert not list((overlapped.run / "wys" / "edits").glob("*"))


def test_no_edit_is_lost_when_a_run_is_killed_after_apply(overlapped, scene, editor_folder, tmp_path, monkeypatch):
    """Apply on top commits the pending edit of the step before, and the checkpoint that follows contains it."""

    def apply(trainer: WysTrainer) -> None:
        trainer.pipeline.panel.commands.put(ViewerCommand("apply", ON_TOP, "make the bear red"))

    def save_and_end(trainer: WysTrainer, *arguments, **named) -> None:
        save(trainer, *arguments, **named)
        if len(trainer.pipeline.session.history.entries) == 2:
            raise SystemExit("killed")

    save = WysTrainer.save_checkpoint
    reference = TrainCommand(scene, editor_folder, tmp_path / "reference", monkeypatch)
    assert reference("--mask-threshold=0", step=9, action=apply) is None
    with monkeypatch.context() as patch:
        patch.setattr(WysTrainer, "save_checkpoint", save_and_end)
        assert overlapped("--mask-threshold=0", step=9, action=apply) == "killed"
    assert [edit["step"] for edit in edits(overlapped)] == [8, 10]
    assert overlapped("--mask-threshold=0", "--load-dir", overlapped.run) is None
    timeless = [[{**edit, "seconds": 0} for edit in edits(command)] for command in (overlapped, reference)]
    assert len(timeless[0]) == 5 and timeless[0] == timeless[1]
