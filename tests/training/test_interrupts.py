"""Runs that end before their time, through the real command line: Ctrl-C, a full disk, numbers that are lost, a kill."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import write_ring_scene
from nerfstudio.scripts import train
from nerfstudio.utils import writer
from test_bad_input import TINY

from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.checkpoint import newest_checkpoint, read_checkpoint
from wys_nerfstudio.training.run_state import SETTINGS_KEY
from wys_nerfstudio.viewer.panel import ViewerCommand

STEPS = 11
SHORT = ["--pipeline.reconstruct-steps=4", "--pipeline.localize-steps=2", "--pipeline.edit-steps=5", "--steps-per-save=4",
         "--pipeline.edit-every=2", "--timestamp=run", "--instruction=make the ball blue"]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("endings") / "scene", width=16, height=12, views=4)


class Command:
    """`ns-train wys-tiny` with a short run; what it is asked at a step happens after that step's training."""

    def __init__(self, scene: Path, editor: Path, output: Path, patch: pytest.MonkeyPatch) -> None:
        self.output, self._patch = output, patch
        self._fixed = ["wys-tiny", "--data", scene, "--editor", editor, *TINY, *SHORT, "--output-dir", output]
        self.run = output / "scene" / "wys-tiny" / "run"

    def __call__(
        self, *extra: object, at: int = -1, happens: Optional[Callable[[WysTrainer], object]] = None
    ) -> object:
        """Runs it; returns its exit code or sentence, None if it came to its end."""
        iteration = WysTrainer.train_iteration

        def watched(trainer: WysTrainer, step: int):
            loss, *rest = iteration(trainer, step)
            result = happens(trainer) if step == at and happens is not None else None
            return (result if isinstance(result, torch.Tensor) else loss), *rest

        with self._patch.context() as patch:
            patch.setattr(WysTrainer, "train_iteration", watched)
            patch.setattr(writer, "EVENT_WRITERS", [])  # nerfstudio's are one process's, not one run's
            patch.setattr(sys, "argv", ["ns-train", *map(str, (*self._fixed, *extra))])
            try:
                train.entrypoint()
            except SystemExit as ending:
                return ending.code
        return None

    def newest(self) -> Path:
        path = newest_checkpoint(self.run / "nerfstudio_models")
        assert path is not None
        return path

    def weights(self) -> dict[str, Any]:
        """The last checkpoint's weights and, under `SETTINGS_KEY`, settings."""
        assert self.newest().name == f"step-{STEPS - 1:09d}.ckpt"
        return read_checkpoint(self.newest())["pipeline"]


@pytest.fixture
def command(scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch) -> Command:
    return Command(scene, editor_folder, tmp_path / "out", monkeypatch)


@pytest.fixture(scope="module")
def whole(scene: Path, editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights of the run that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        command = Command(scene, editor_folder, tmp_path_factory.mktemp("whole"), patch)
        assert command() is None
        return command.weights()


def assert_equal_weights(weights: dict[str, Any], expected: dict[str, Any]) -> None:
    settings, expected_settings = weights.pop(SETTINGS_KEY), expected[SETTINGS_KEY]
    assert settings == expected_settings
    assert weights.keys() == expected.keys() - {SETTINGS_KEY}
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def assert_resume_matches(command: Command, whole: dict[str, Any]) -> None:
    assert command("--load-dir", command.run) is None
    assert_equal_weights(command.weights(), whole)


def interrupt(_trainer: WysTrainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [2, 7])
def test_ctrl_c_saves_says_how_to_resume_and_exits_with_130(command, whole, capsys, step):
    before = signal.getsignal(signal.SIGINT)
    assert command(at=step, happens=interrupt) == 130
    said = capsys.readouterr()
    assert "Stopping after this step" in said.out and "Traceback" not in said.out + said.err
    ending = f'wys: Stopped after step {step}; to resume, type the same command with --load-dir "{command.run}".'
    assert ending in said.err
    assert command.newest().name == f"step-{step:09d}.ckpt"
    assert signal.getsignal(signal.SIGINT) is before
    assert_resume_matches(command, whole)


def test_the_end_of_a_queues_time_is_taken_as_ctrl_c(command, whole, capsys):
    def both(_trainer: WysTrainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert command(at=7, happens=both) == 130
    assert "wys: Stopped after step 7; to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert_resume_matches(command, whole)


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint(command, whole, capsys):
    def twice(trainer: WysTrainer) -> None:
        interrupt(trainer)
        interrupt(trainer)

    assert command(at=6, happens=twice) == 130
    assert "wys: Stopped at once" in capsys.readouterr().err
    assert command.newest().name == "step-000000004.ckpt"
    assert_resume_matches(command, whole)


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(command):
    said = str(command(at=6, happens=lambda trainer: torch.tensor(float("nan"))))
    good = command.newest()
    assert said.startswith("wys: The loss became NaN or Inf at step 6: training stops and saves nothing.")
    assert f'The last good checkpoint is "{good}"' in said and good.name == "step-000000004.ckpt"


def test_a_lost_weight_is_not_saved(command):
    def lose(trainer: WysTrainer) -> None:
        next(iter(trainer.pipeline.scene_model.field.mlp_head.parameters())).data.fill_(float("nan"))

    said = str(command(at=4, happens=lose))
    assert "A weight became NaN or Inf at step 4" in said and "There is no checkpoint yet" in said
    assert newest_checkpoint(command.run / "nerfstudio_models") is None


def test_a_disk_that_cannot_be_written_any_more_ends_the_run_and_leaves_it_whole(command, whole, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        said = str(command(at=7, happens=lambda trainer: patch.setattr(os, "fsync", fail)))
    assert re.match(f'wys: ".*" could not be written: {os.strerror(errno.EROFS)}. Correct that first', said), said
    assert f'--load-dir "{command.run}"' in said and command.newest().name == "step-000000004.ckpt"
    assert not list(command.run.rglob("*.partial"))
    assert_resume_matches(command, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_it_whole(small_disk, scene, editor_folder, whole, monkeypatch):
    command, ballast = Command(scene, editor_folder, small_disk / "out", monkeypatch), small_disk / "ballast"

    def fill(_trainer: WysTrainer) -> None:
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError as error:
                assert error.errno == errno.ENOSPC

    said = str(command(at=7, happens=fill))
    assert "could not be written: No space left on device" in said, said
    assert command.newest().name == "step-000000004.ckpt"
    ballast.unlink()
    assert_resume_matches(command, whole)


def test_a_truncated_newest_checkpoint_costs_the_steps_since_the_one_before_it(command, whole, capsys):
    assert command(at=9, happens=interrupt) == 130
    newest = command.newest()
    newest.write_bytes(newest.read_bytes()[:5000])
    capsys.readouterr()
    assert_resume_matches(command, whole)
    said = " ".join(capsys.readouterr().out.split())
    assert "could not be read" in said and "The previous one is used." in said and "Resuming at step 9" in said


@pytest.mark.slow
def test_edits_follow_one_another_and_every_earlier_state_can_be_brought_back(
    scene, editor_folder, whole, tmp_path, monkeypatch
):
    first = Command(scene, editor_folder, tmp_path / "first", monkeypatch)
    assert first() is None

    def entries(command: Command) -> list[tuple[str, str]]:
        history = json.loads((command.run / "wys" / "history.json").read_text())
        return [(entry["instruction"], entry["start"]) for entry in history]

    def same(path: Path) -> bool:
        pipeline = read_checkpoint(path)["pipeline"]
        return all(torch.equal(pipeline[key], whole[key]) for key in whole)

    # The second edit starts from the first one's scene and views.
    second = Command(scene, editor_folder, tmp_path / "second", monkeypatch)
    assert second("--instruction=make the bear red", "--base-run", first.run) is None
    assert entries(second) == [("make the ball blue", "captured"), ("make the bear red", "on top")]
    assert same(second.run / "wys" / "history" / "001.ckpt") and not same(second.newest())
    for path in (first.run / "wys" / "edits").iterdir():
        assert (second.run / "wys" / "reference" / path.name).read_bytes() == path.read_bytes()

    # Undo returns to it, and there is nothing left to do then.
    undone = Command(scene, editor_folder, tmp_path / "undone", monkeypatch)
    undo = ViewerCommand("undo")
    ask = {"at": 4, "happens": lambda trainer: trainer.pipeline.panel.commands.put(undo)}
    assert undone("--instruction=make the bear red", "--base-run", first.run, **ask) is None
    assert entries(undone) == [("make the ball blue", "captured")]
    assert same(undone.newest()) and undone.newest().name == "step-000000004.ckpt"
    for path in (first.run / "wys" / "edits").iterdir():
        assert (undone.run / "wys" / "edits" / path.name).read_bytes() == path.read_bytes()
    assert "The run is finished" in str(undone("--load-dir", undone.run))

    # A moment of the history is a base, too, with the history that it had.
    third = Command(scene, editor_folder, tmp_path / "third", monkeypatch)
    moment = second.run / "wys" / "history" / "001.ckpt"
    assert third("--instruction=make it red", "--base-run", moment) is None
    assert entries(third) == [("make the ball blue", "captured"), ("make it red", "on top")]
    assert same(third.run / "wys" / "history" / "001.ckpt")
    captured = [read_checkpoint(c.run / "wys" / "captured.ckpt")["pipeline"] for c in (first, third)]
    assert all(torch.equal(captured[0][key], captured[1][key]) for key in whole)


@pytest.mark.slow
def test_twenty_kills_at_seeded_moments_change_nothing(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "kills.py"
    arguments = ["--kills", "20", "--seed", "1", "--output", tmp_path]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kills, equal = map(int, done.stdout.splitlines()[-1].split()[1:])
    assert kills >= 20 and equal == kills
