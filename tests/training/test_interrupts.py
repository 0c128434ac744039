"""Interrupted runs of the real command line: Ctrl-C, SIGTERM, write errors, NaN losses and weights, kills."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import write_ring_scene
from nerfstudio.scripts import train
from nerfstudio.utils import writer
from test_bad_input import TINY

from wys_nerfstudio import trainer as trainer_module
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.checkpoint import copy_to_cpu, newest_checkpoint, read_checkpoint
from wys_nerfstudio.training.run_state import SETTINGS_KEY
from wys_nerfstudio.viewer.commands import CommandHandler
from wys_nerfstudio.viewer.panel import ViewerCommand

STEPS = 11
SHORT = ["--pipeline.reconstruct-steps=4", "--pipeline.localize-steps=2", "--pipeline.edit-steps=5", "--steps-per-save=4",
         "--pipeline.edit-every=2", "--timestamp=run", "--instruction=make the ball blue"]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("interrupts") / "scene", width=16, height=12, views=4)


class TrainCommand:
    """`ns-train wys-tiny` with a short run."""

    def __init__(self, scene: Path, editor: Path, output: Path, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._fixed = ["wys-tiny", "--data", scene, "--editor", editor, *TINY, *SHORT, "--output-dir", output]
        self.run = output / "scene" / "wys-tiny" / "run"

    def __call__(
        self, *arguments: object, step: int = -1, action: Optional[Callable[[WysTrainer], object]] = None
    ) -> object:
        """Run the command.

        Args:
            arguments: Further arguments of the command line.
            step: Step after whose training `action` is called.
            action: Fault to inject. A tensor that it returns replaces the loss of that step.

        Returns:
            Exit code or error message; None if the run finished.
        """
        iteration = WysTrainer.train_iteration

        def train_iteration(trainer: WysTrainer, current: int):
            loss, *rest = iteration(trainer, current)
            result = action(trainer) if current == step and action is not None else None
            return (result if isinstance(result, torch.Tensor) else loss), *rest

        with self._patch.context() as patch:
            patch.setattr(WysTrainer, "train_iteration", train_iteration)
            patch.setattr(writer, "EVENT_WRITERS", [])  # a global of nerfstudio: writers of earlier runs would remain
            patch.setattr(sys, "argv", ["ns-train", *map(str, (*self._fixed, *arguments))])
            try:
                train.entrypoint()
            except SystemExit as error:
                return error.code
        return None

    def newest(self) -> Path:
        """Return the newest checkpoint of the run."""
        path = newest_checkpoint(self.run / "nerfstudio_models")
        assert path is not None
        return path

    def weights(self) -> dict[str, Any]:
        """Return the weights of the final checkpoint and, under `SETTINGS_KEY`, the settings."""
        assert self.newest().name == f"step-{STEPS - 1:09d}.ckpt"
        return read_checkpoint(self.newest())["pipeline"]


@pytest.fixture
def command(scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch) -> TrainCommand:
    return TrainCommand(scene, editor_folder, tmp_path / "out", monkeypatch)


@pytest.fixture(scope="module")
def reference(scene: Path, editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights of the uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        command = TrainCommand(scene, editor_folder, tmp_path_factory.mktemp("reference"), patch)
        assert command() is None
        return command.weights()


def equal_weights(weights: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Compare weights bit for bit; settings are compared by `assert_equal_weights` only."""
    tensors = expected.keys() - {SETTINGS_KEY}
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in tensors)


def assert_equal_weights(weights: dict[str, Any], expected: dict[str, Any]) -> None:
    assert weights[SETTINGS_KEY] == expected[SETTINGS_KEY]
    assert equal_weights(weights, expected)


def assert_resume_matches(command: TrainCommand, reference: dict[str, Any]) -> None:
    assert command("--load-dir", command.run) is None
    assert_equal_weights(command.weights(), reference)


def interrupt(_trainer: WysTrainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [2, 7])
def test_ctrl_c_saves_and_the_run_can_be_resumed(command, reference, capsys, step):
    before = signal.getsignal(signal.SIGINT)
    assert command(step=step, action=interrupt) == 130
    printed = capsys.readouterr()
    assert "Stopping after this step" in printed.out and "Traceback" not in printed.out + printed.err
    message = f'wys: Stopped after step {step}; to resume, type the same command with --load-dir "{command.run}".'
    assert message in printed.err
    assert command.newest().name == f"step-{step:09d}.ckpt"
    assert signal.getsignal(signal.SIGINT) is before
    assert_resume_matches(command, reference)


def test_repeated_sigterm_is_handled_as_one_ctrl_c(command, reference, capsys):
    def terminate_twice(_trainer: WysTrainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert command(step=7, action=terminate_twice) == 130
    assert "wys: Stopped after step 7; to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert_resume_matches(command, reference)


def test_a_second_ctrl_c_stops_at_once_without_saving(command, reference, capsys):
    def interrupt_twice(trainer: WysTrainer) -> None:
        interrupt(trainer)
        interrupt(trainer)

    assert command(step=6, action=interrupt_twice) == 130
    assert "wys: Stopped at once" in capsys.readouterr().err
    assert command.newest().name == "step-000000004.ckpt"
    assert_resume_matches(command, reference)


def test_a_nan_loss_stops_the_run_and_saves_nothing(command):
    message = str(command(step=6, action=lambda trainer: torch.tensor(float("nan"))))
    newest = command.newest()
    assert message.startswith("wys: The loss became NaN or Inf at step 6: training stops and saves nothing.")
    assert f'The last good checkpoint is "{newest}"' in message and newest.name == "step-000000004.ckpt"


def test_a_nan_weight_is_not_saved(command):
    def spoil_weight(trainer: WysTrainer) -> None:
        next(iter(trainer.pipeline.scene_model.field.mlp_head.parameters())).data.fill_(float("nan"))

    message = str(command(step=4, action=spoil_weight))
    assert "A weight became NaN or Inf at step 4" in message and "There is no checkpoint yet" in message
    assert newest_checkpoint(command.run / "nerfstudio_models") is None


def test_a_write_error_stops_the_run_and_leaves_it_resumable(command, reference, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        message = str(command(step=7, action=lambda trainer: patch.setattr(os, "fsync", fail)))
    assert re.match(f'wys: ".*" could not be written: {os.strerror(errno.EROFS)}. Correct that first', message), message
    assert f'--load-dir "{command.run}"' in message and command.newest().name == "step-000000004.ckpt"
    assert not list(command.run.rglob("*.partial"))
    assert_resume_matches(command, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system requires root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_it_resumable(small_disk, scene, editor_folder, reference, monkeypatch):
    command = TrainCommand(scene, editor_folder, small_disk / "out", monkeypatch)
    filler = small_disk / "filler"

    def fill(_trainer: WysTrainer) -> None:
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError as error:
                assert error.errno == errno.ENOSPC

    message = str(command(step=7, action=fill))
    assert "could not be written: No space left on device" in message, message
    assert command.newest().name == "step-000000004.ckpt"
    filler.unlink()
    assert_resume_matches(command, reference)


def test_checkpoints_are_written_while_training_continues(command, tmp_path, monkeypatch):
    save, trainers, weights, written = trainer_module.save_checkpoint_file, [], [], []

    def delayed_save(folder: Path, checkpoint: dict[str, Any], only_latest: bool) -> None:
        began = time.monotonic()
        while checkpoint["step"] == 4 and trainers[0].step < 7:
            assert time.monotonic() - began < 60, "training waits for the checkpoint"
            time.sleep(0.01)
        save(folder, checkpoint, only_latest)
        written.append(checkpoint["step"])
        if checkpoint["step"] == 4:
            shutil.copy(newest_checkpoint(folder), tmp_path / "early.ckpt")

    def after_step_4(trainer: WysTrainer) -> None:
        trainers.append(trainer)
        weights.append(copy_to_cpu(trainer.pipeline.weights()))

    monkeypatch.setattr(trainer_module, "save_checkpoint_file", delayed_save)
    assert command(step=4, action=after_step_4) is None
    assert written == [4, 8, 10]
    early = read_checkpoint(tmp_path / "early.ckpt")
    assert early["step"] == 4
    assert_equal_weights(early["pipeline"], weights[0])


def test_commands_wait_for_files_that_are_being_written(command, monkeypatch):
    save, run, written, seen = trainer_module.save_checkpoint_file, CommandHandler._run, [], []

    def slow_save(folder: Path, checkpoint: dict[str, Any], only_latest: bool) -> None:
        time.sleep(0.5)
        save(folder, checkpoint, only_latest)
        written.append(checkpoint["step"])

    def watched_run(handler: CommandHandler, given: ViewerCommand, step: int) -> str:
        seen.append((step, list(written)))
        return run(handler, given, step)

    monkeypatch.setattr(trainer_module, "save_checkpoint_file", slow_save)
    monkeypatch.setattr(CommandHandler, "_run", watched_run)
    threshold = ViewerCommand("set", "mask_threshold", 0.3)
    assert command(step=4, action=lambda trainer: trainer.pipeline.panel.commands.put(threshold)) is None
    assert seen == [(4, [4])]


def test_a_truncated_checkpoint_is_replaced_by_the_previous_one(command, reference, capsys):
    assert command(step=9, action=interrupt) == 130
    newest = command.newest()
    newest.write_bytes(newest.read_bytes()[:5000])
    capsys.readouterr()
    assert_resume_matches(command, reference)
    message = " ".join(capsys.readouterr().out.split())
    assert "could not be read" in message and "The previous one is used." in message and "Resuming at step 9" in message


@pytest.mark.slow
def test_edits_are_chained_and_undone(scene, editor_folder, reference, tmp_path, monkeypatch):
    first = TrainCommand(scene, editor_folder, tmp_path / "first", monkeypatch)
    assert first() is None

    def entries(command: TrainCommand) -> list[tuple[str, str]]:
        history = json.loads((command.run / "wys" / "history.json").read_text())
        return [(entry["instruction"], entry["start"]) for entry in history]

    def equals_reference(path: Path) -> bool:
        return equal_weights(read_checkpoint(path)["pipeline"], reference)

    # The second edit starts from the first one's scene and views.
    second = TrainCommand(scene, editor_folder, tmp_path / "second", monkeypatch)
    assert second("--instruction=make the bear red", "--base-run", first.run) is None
    assert entries(second) == [("make the ball blue", "captured"), ("make the bear red", "on top")]
    assert equals_reference(second.run / "wys" / "history" / "001.ckpt") and not equals_reference(second.newest())
    for path in (first.run / "wys" / "edits").iterdir():
        assert (second.run / "wys" / "reference" / path.name).read_bytes() == path.read_bytes()

    # Undo restores it, and the run counts as finished.
    undone = TrainCommand(scene, editor_folder, tmp_path / "undone", monkeypatch)
    arguments = ["--instruction=make the bear red", "--base-run", first.run]
    undo = ViewerCommand("undo")
    assert undone(*arguments, step=4, action=lambda trainer: trainer.pipeline.panel.commands.put(undo)) is None
    assert entries(undone) == [("make the ball blue", "captured")]
    assert equals_reference(undone.newest()) and undone.newest().name == "step-000000004.ckpt"
    for path in (first.run / "wys" / "edits").iterdir():
        assert (undone.run / "wys" / "edits" / path.name).read_bytes() == path.read_bytes()
    assert "The run is finished" in str(undone("--load-dir", undone.run))

    # A snapshot of the history can also be a base run; it keeps its own history.
    third = TrainCommand(scene, editor_folder, tmp_path / "third", monkeypatch)
    snapshot = second.run / "wys" / "history" / "001.ckpt"
    assert third("--instruction=make it red", "--base-run", snapshot) is None
    assert entries(third) == [("make the ball blue", "captured"), ("make it red", "on top")]
    assert equals_reference(third.run / "wys" / "history" / "001.ckpt")
    captured = [read_checkpoint(c.run / "wys" / "captured.ckpt")["pipeline"] for c in (first, third)]
    assert equal_weights(*captured)


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "kills.py"
    arguments = ["--kills", "20", "--seed", "1", "--output", tmp_path]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    kills, equal = map(int, result.stdout.splitlines()[-1].split()[1:])
    assert kills >= 20 and equal == kills
