"""Interrupted runs of the real command line: Ctrl-C, SIGTERM, write and memory errors, NaN losses and weights, kills."""

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
import yaml
from conftest import write_ring_scene
from filelock import FileLock, Timeout
from flux2_folder import build_flux2_folder
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.scripts import eval as ns_eval
from nerfstudio.scripts import train
from nerfstudio.utils import writer
from nerfstudio.utils.eval_utils import eval_setup
from test_bad_input import TINY

from wys_nerfstudio import trainer as trainer_module
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.pipeline import WysPipeline
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.checkpoint import copy_to_cpu, newest_checkpoint, read_checkpoint
from wys_nerfstudio.training.interrupts import convert_disk_errors, exit_on_error
from wys_nerfstudio.training.run_state import SETTINGS_KEY
from wys_nerfstudio.training.session import EditSession
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import LOCK_FILE
from wys_nerfstudio.viewer.commands import CommandHandler
from wys_nerfstudio.viewer.panel import INSTEAD, ON_TOP, ViewerCommand

STEPS = 11
SHORT = ["--pipeline.reconstruct-steps=4", "--pipeline.localize-steps=2", "--pipeline.edit-steps=5", "--steps-per-save=4",
         "--pipeline.edit-every=2", "--timestamp=run", "--instruction=make the ball blue"]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("interrupts") / "scene", width=20, height=16, views=4)


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
    assert "Stopping after this step or render" in printed.out and "Traceback" not in printed.out + printed.err
    message = f'wys: Stopped after step {step}; to resume, type the same command with --load-dir "{command.run}".'
    assert message in printed.err
    assert command.newest().name == f"step-{step:09d}.ckpt"
    assert signal.getsignal(signal.SIGINT) is before
    assert_resume_matches(command, reference)


def at_the_contact_sheet(command: TrainCommand, then: Callable[[], object]) -> Callable[[WysTrainer], None]:
    """Return an action for the last step: `then` is called after the first render for the contact sheet, by when the run must be
    saved."""

    def watch(trainer: WysTrainer) -> None:
        scene = trainer.pipeline.scene_model
        render = scene.render_pixels

        def render_once(*arguments: Any) -> Any:
            assert trainer._writing._running is None
            assert command.newest().name == f"step-{STEPS - 1:09d}.ckpt"
            edited = trainer.pipeline.datamanager.edited_views
            assert len(list((command.run / "wys" / "edits").glob("*.png"))) == len(edited) > 0
            scene.render_pixels = render  # type: ignore
            result = render(*arguments)
            then()
            return result

        scene.render_pixels = render_once  # type: ignore

    return watch


SAVED = "the run is finished and saved; wys compare "


@pytest.mark.parametrize("moment", ["last step", "contact sheet"])
def test_ctrl_c_at_the_end_leaves_a_finished_run_without_a_sheet(command, reference, capsys, moment):
    interrupted = at_the_contact_sheet(command, lambda: interrupt(None))  # type: ignore
    assert command(step=STEPS - 1, action=interrupt if moment == "last step" else interrupted) == 130
    message = f'wys: Stopped before the contact sheet was written: {SAVED}"{command.run}" renders a contact sheet.'
    assert message in capsys.readouterr().err
    assert not (command.run / "wys" / "contact_sheet.png").exists()
    assert_equal_weights(command.weights(), reference)


def test_a_run_killed_before_its_contact_sheet_is_finished(command, reference):
    def kill() -> None:
        raise KeyboardInterrupt

    assert command(step=STEPS - 1, action=at_the_contact_sheet(command, kill)) == 130
    assert_equal_weights(command.weights(), reference)
    assert "The run is finished" in str(command("--load-dir", command.run))
    assert eval_setup(command.run / "config.yml")[3] == STEPS - 1


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_on_cutouts_resumes_equal(editor_folder, tmp_path, monkeypatch, step):
    scene = write_ring_scene(tmp_path / "scene", width=20, height=16, views=4, alpha=True)
    whole, stopped = (TrainCommand(scene, editor_folder, tmp_path / name, monkeypatch) for name in ("whole", "stopped"))
    background = "--pipeline.model.background-color=random"
    assert whole(background) is None and stopped(background, step=step, action=interrupt) == 130
    assert stopped(background, "--load-dir", stopped.run) is None
    assert_equal_weights(stopped.weights(), whole.weights())


@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_a_run_with_flux2_resumes_equal(scene, tmp_path, monkeypatch, kind):
    editor = build_flux2_folder(tmp_path / "editor", distilled=kind == "distilled")
    whole, stopped = (TrainCommand(scene, editor, tmp_path / name, monkeypatch) for name in ("whole", "stopped"))
    assert whole() is None and stopped(step=7, action=interrupt) == 130
    assert stopped("--load-dir", stopped.run) is None
    assert_equal_weights(stopped.weights(), whole.weights())
    assert list((whole.run / "wys" / "edits").glob("*.png"))


def test_repeated_sigterm_is_handled_as_one_ctrl_c(command, reference, capsys):
    def terminate_twice(_trainer: WysTrainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert command(step=7, action=terminate_twice) == 130
    assert "wys: Stopped after step 7; to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert_resume_matches(command, reference)


def hang_up(_trainer: WysTrainer) -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def test_a_closed_terminal_saves_the_run(command, reference, capsys):
    before = signal.getsignal(signal.SIGHUP)
    assert command(step=7, action=hang_up) == 130
    assert "wys: Stopped after step 7; to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGHUP) is before
    assert_resume_matches(command, reference)


def test_nohup_keeps_the_run_alive(command, reference):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command(step=7, action=hang_up) is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_equal_weights(command.weights(), reference)


def test_a_closed_output_does_not_end_the_run(command, reference, monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert command(step=2, action=lambda trainer: os.close(reader)) is None
    assert_equal_weights(command.weights(), reference)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
                                    errno.ELOOP, errno.EFBIG, errno.ENOSPC, errno.EBUSY])  # fmt: skip
def test_every_error_of_a_file_of_the_run_is_a_sentence(tmp_path, number):
    with pytest.raises(WysError, match=f'"{tmp_path}/wys/x" could not be written: {os.strerror(number)}. Correct'):
        with convert_disk_errors(tmp_path):
            raise OSError(number, os.strerror(number), str(tmp_path / "wys" / "x"))
    with pytest.raises(SystemExit, match=f'wys: "/other/x" cannot be used: {os.strerror(number)}. Correct the path'):
        with exit_on_error(), convert_disk_errors(tmp_path):
            raise OSError(number, os.strerror(number), "/other/x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_disk_errors_without_a_file_name_are_a_sentence(tmp_path, number):
    with pytest.raises(WysError, match=f'"{tmp_path}" could not be written: {os.strerror(number)}. Correct'):
        with convert_disk_errors(tmp_path):
            raise OSError(number, os.strerror(number))


def test_errors_of_no_file_are_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        with exit_on_error(), convert_disk_errors(tmp_path):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


@pytest.mark.parametrize("name", ["masks", "edits", "checkpoint.partial", "../nerfstudio_models"])
def test_a_file_or_folder_in_the_way_stops_the_run(command, name):
    def obstruct(trainer: WysTrainer) -> None:
        path = (command.run / "wys" / name).resolve()
        if name == "checkpoint.partial":
            path.mkdir()
        else:
            path.touch()

    message = str(command(step=3, action=obstruct))
    assert re.match(f'wys: ".*{Path(name).name}.*" could not be written: ', message), message


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


def run_out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def run_out_of_main_memory(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory")


RESUME = '; to resume, type the same command with --load-dir "{run}".'


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (2, "in a training step: try --pipeline.datamanager.train-num-rays-per-batch 32."),
        (7, f"in a training step: try --pipeline.datamanager.edit-num-rays-per-batch 32{RESUME}"),
    ],
)
def test_a_step_out_of_memory_leaves_the_run_resumable(command, reference, step, message):
    expected = f"wys: The GPU ran out of memory {message.format(run=command.run)}"
    assert command(step=step, action=run_out_of_memory) == expected
    arguments = ["--load-dir", command.run] if step == 7 else []
    assert command(*arguments) is None
    assert_equal_weights(command.weights(), reference)


@pytest.mark.parametrize(
    ("part", "step", "message"),
    [
        ("encode", 0, "The computer ran out of memory while relevance maps were computed: try --pipeline.relevance-batch-size 1 or a lower --pipeline.edit-resolution."),
        ("decode", 0, f"The computer ran out of memory while views were edited: try --pipeline.model.eval-num-rays-per-chunk 512 or a lower --pipeline.edit-resolution{RESUME}"),
    ],
    ids=["maps", "edits"],
)  # fmt: skip
def test_an_editor_out_of_memory_leaves_the_run_resumable(command, reference, monkeypatch, part, step, message):
    def fail(_trainer: WysTrainer) -> None:
        monkeypatch.setattr(StableDiffusionEditor, part, run_out_of_main_memory)

    assert command(step=step, action=fail) == f"wys: {message.format(run=command.run)}"
    monkeypatch.undo()
    arguments = ["--load-dir", command.run] if part == "decode" else []
    assert command(*arguments) is None
    assert_equal_weights(command.weights(), reference)


@pytest.mark.parametrize("part", ["wys_nerfstudio.pipeline.load_editor", f"{VanillaDataManager.__module__}.VanillaDataManager.__init__"],
                         ids=["editor", "views"])  # fmt: skip
def test_a_start_out_of_memory_leaves_no_run(command, monkeypatch, part):
    monkeypatch.setattr(part, run_out_of_memory)
    message = "wys: The GPU ran out of memory while the run was prepared: try smaller views."
    assert command() == message and not command.run.exists()


def send(action: str, *arguments: str) -> Callable[[WysTrainer], None]:
    """Return an action that sends a command of the panel."""
    return lambda trainer: trainer.pipeline.panel.commands.put(ViewerCommand(action, *arguments))  # type: ignore


def test_a_preview_out_of_memory_does_not_end_the_run(command, reference, monkeypatch, capsys):
    def preview(trainer: WysTrainer) -> None:
        monkeypatch.setattr(trainer.pipeline.session.edit_loop, "preview", run_out_of_memory)
        send("preview", "make it red", (0.0,) * 6)(trainer)  # type: ignore

    assert command(step=7, action=preview) is None
    assert "ran out of memory while views were edited" in " ".join(capsys.readouterr().out.split())
    assert_equal_weights(command.weights(), reference)


@pytest.mark.parametrize("moment", ["its maps", "its start", "a reset"])
def test_an_instruction_out_of_memory_is_undone(command, reference, monkeypatch, capsys, moment):
    def fail_after(method: Callable) -> Callable:
        return lambda *arguments: (method(*arguments), run_out_of_memory())

    def apply(trainer: WysTrainer) -> None:
        if moment == "its maps":
            monkeypatch.setattr(StableDiffusionEditor, "encode", run_out_of_memory)
        name = "reset" if moment == "a reset" else "apply"
        if moment != "its maps":
            monkeypatch.setattr(EditSession, name, fail_after(getattr(EditSession, name)))
        send(name, ON_TOP, "make the bear red")(trainer)

    assert command(step=STEPS - 1, action=apply) is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "The GPU ran out of memory while" in printed and "to resume, type the same command" in printed
    assert_equal_weights(command.weights(), reference)
    history = json.loads((command.run / "wys" / "history.json").read_text())
    assert [entry["instruction"] for entry in history] == ["make the ball blue"]
    assert not list((command.run / "wys" / "history").iterdir())


@pytest.mark.parametrize("several_processes", [False, True])
def test_an_undo_or_one_process_out_of_memory_ends_the_run(command, monkeypatch, several_processes):
    if several_processes:
        monkeypatch.setattr("wys_nerfstudio.viewer.commands.world_size", lambda: 2)
        action, method = send("apply", ON_TOP, "make the bear red"), "apply"
    else:
        action, method = send("undo"), "restore"
        monkeypatch.setattr("wys_nerfstudio.training.history.History.last_snapshot", lambda _: {})
    monkeypatch.setattr(EditSession, method, run_out_of_memory)
    message = str(command(step=7, action=action))
    assert message.startswith("wys: The GPU ran out of memory while views were edited: try ")
    assert message.endswith(RESUME.format(run=command.run))


@pytest.mark.parametrize("moment", ["evaluation", "contact sheet"])
def test_renders_out_of_memory_end_with_a_sentence(command, monkeypatch, moment):
    def fail(trainer: WysTrainer) -> None:
        if moment == "evaluation":
            trainer.pipeline.datamanager.eval_dataset = [0]  # type: ignore
            monkeypatch.setattr(trainer, "eval_iteration", run_out_of_memory)
        else:
            monkeypatch.setattr(trainer.pipeline.session.edit_loop, "write_contact_sheet", run_out_of_memory)

    remedy = f"try --pipeline.model.eval-num-rays-per-chunk 512{RESUME.format(run=command.run)}"
    if moment == "contact sheet":
        remedy = f'{SAVED}"{command.run}" renders a contact sheet.'
    assert command(step=7, action=fail) == f"wys: The GPU ran out of memory while views were rendered: {remedy}"


@pytest.mark.parametrize(
    ("part", "activity"), [("prepare_relevance", "relevance maps were computed"), ("enter_phase", "views were edited")]
)
def test_reopening_a_run_out_of_memory_ends_it(command, monkeypatch, part, activity):
    assert command() is None
    monkeypatch.setattr(EditSession, part, run_out_of_memory)
    message = str(command("--load-dir", command.run, "--vis=viewer", "--viewer.websocket-port=7412"))
    assert message.startswith(f"wys: The GPU ran out of memory while {activity}: try ")


def test_ns_eval_out_of_memory_ends_with_a_sentence(command, monkeypatch, tmp_path):
    assert command() is None
    monkeypatch.setattr(WysPipeline, "evaluate_edit", run_out_of_memory)
    arguments = ["ns-eval", "--load-config", command.run / "config.yml", "--output-path", tmp_path / "eval.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
    with pytest.raises(SystemExit) as ended:
        ns_eval.entrypoint()
    assert str(ended.value.code) == (
        "wys: The GPU ran out of memory while views were evaluated: end other programs that use its memory, or lower "
        "eval_num_rays_per_chunk in the run's config.yml to 512."
    )


def test_evaluation_uses_the_newest_undamaged_checkpoint(command, capsys):
    assert command() is None
    config, newest = command.run / "config.yml", command.newest()
    assert eval_setup(config)[2] == newest
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    _, pipeline, path, step = eval_setup(config)
    assert path.name == "step-000000008.ckpt" and step == 8
    assert torch.equal(pipeline.state_dict()["_model.field.mlp_head.layers.0.weight"],
                       read_checkpoint(path)["pipeline"]["_model.field.mlp_head.layers.0.weight"])  # fmt: skip
    assert "The previous one is used." in " ".join(capsys.readouterr().out.split())
    again = yaml.load(config.read_text(), Loader=yaml.Loader)
    again.timestamp = "again"
    again.set_timestamp()  # as ns-train does with --load-config
    assert again.get_checkpoint_dir() == command.run.parent / "again" / "nerfstudio_models" and again.load_step is None
    path.write_bytes(b"")
    with pytest.raises(SystemExit, match=f'wys: The checkpoint "{path}" could not be read'):
        eval_setup(config)
    shutil.rmtree(command.run / "nerfstudio_models")
    with pytest.raises(SystemExit, match="wys: No checkpoint found in"):
        eval_setup(config)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["captured.ckpt", "history/001.ckpt"])
def test_a_disk_too_full_for_the_scenes_of_a_run_is_named(command, small_disk, scene, editor_folder, monkeypatch, name):
    assert command(step=9, action=interrupt) == 130
    large = command.run / "wys" / name
    large.parent.mkdir(exist_ok=True)
    large.write_bytes(bytes(32 << 20))
    resumed = TrainCommand(scene, editor_folder, small_disk / "out", monkeypatch)
    message = str(resumed("--load-dir", command.run))
    copy = resumed.run / "wys" / name
    assert message.startswith(f'wys: "{copy}" could not be written: No space left on device.'), message
    assert not copy.exists() and large.stat().st_size == 32 << 20


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


def test_a_run_has_one_writer_at_a_time(command, reference):
    def start_again(trainer: WysTrainer) -> None:
        with pytest.raises(Timeout):
            FileLock(trainer.base_dir / LOCK_FILE, timeout=0).acquire()
        interrupt(trainer)

    assert command(step=7, action=start_again) == 130
    with FileLock(command.run / LOCK_FILE):
        assert f'Another process is writing the run in "{command.run}"' in str(command("--load-dir", command.run))
    assert_resume_matches(command, reference)


def test_a_resumed_run_trains_with_the_learning_rates_typed(command):
    rates: dict[str, float] = {}

    def note_rates(trainer: WysTrainer) -> None:
        rates["fields"] = trainer.optimizers.schedulers["fields"].base_lrs[0]
        rates["relevance"] = trainer.optimizers.optimizers["relevance"].param_groups[0]["lr"]
        interrupt(trainer)

    assert command(step=3, action=interrupt) == 130
    typed = ["--optimizers.fields.optimizer.lr=0.002", "--optimizers.relevance.optimizer.lr=0.0007"]
    assert command("--load-dir", command.run, *typed, step=5, action=note_rates) == 130
    assert rates == {"fields": 0.002, "relevance": 0.0007}


def test_scenes_of_a_run_without_checkpoints_are_kept(command):
    assert command(step=7, action=interrupt) == 130
    shutil.rmtree(command.run / "nerfstudio_models")
    captured = command.run / "wys" / "captured.ckpt"
    before = {path: path.read_bytes() for path in command.run.rglob("*") if path.is_file()}
    for arguments in ([], ["--base-run", captured]):
        assert f'--base-run "{captured}" starts from such a scene' in str(command(*arguments))
        assert {path: path.read_bytes() for path in before} == before


def test_an_edited_scene_never_becomes_the_captured_one(command, reference, capsys):
    def reset(trainer: WysTrainer) -> None:
        for action in (ViewerCommand("reset"), ViewerCommand("apply", INSTEAD, "make the bear red")):
            trainer.pipeline.panel.commands.put(action)

    assert command(step=7, action=interrupt) == 130
    (command.run / "wys" / "captured.ckpt").unlink()
    capsys.readouterr()
    assert command("--load-dir", command.run, step=9, action=reset) is None
    message = " ".join(capsys.readouterr().out.split())
    assert message.count('captured.ckpt" any more, so the captured scene cannot be restored') == 2, message
    assert not (command.run / "wys" / "captured.ckpt").exists()
    assert len(json.loads((command.run / "wys" / "history.json").read_text())) == 1
    assert_equal_weights(command.weights(), reference)


def test_an_edited_base_run_without_its_captured_scene_has_none(command, scene, editor_folder, tmp_path, monkeypatch):
    assert command() is None
    (command.run / "wys" / "captured.ckpt").unlink()
    second = TrainCommand(scene, editor_folder, tmp_path / "second", monkeypatch)
    assert second("--base-run", command.run) is None
    assert not (second.run / "wys" / "captured.ckpt").exists()


def test_the_newest_snapshots_are_kept_and_shared(command, scene, editor_folder, tmp_path, monkeypatch):
    def apply_thrice(trainer: WysTrainer) -> None:
        for _ in range(3):
            trainer.pipeline.panel.commands.put(ViewerCommand("apply", ON_TOP, "make the bear red"))

    def undo_thrice(trainer: WysTrainer) -> None:
        for _ in range(3):
            trainer.pipeline.panel.commands.put(ViewerCommand("undo"))

    def snapshots(command: TrainCommand) -> list[str]:
        return sorted(path.name for path in (command.run / "wys" / "history").iterdir())

    kept = "--pipeline.history-size=2"
    assert command(kept, step=7, action=apply_thrice) is None
    assert snapshots(command) == ["002.ckpt", "003.ckpt"]
    set_total_steps = WysTrainer.set_total_steps
    monkeypatch.setattr(
        WysTrainer, "set_total_steps", lambda trainer, steps, paused=False: set_total_steps(trainer, steps)
    )
    second = TrainCommand(scene, editor_folder, tmp_path / "second", monkeypatch)
    assert second(kept, "--load-dir", command.run, "--pipeline.edit-steps=7", step=16, action=undo_thrice) is None
    entries = json.loads((second.run / "wys" / "history.json").read_text())
    assert len(entries) == 2  # two are undone; the third snapshot is gone
    assert snapshots(second) == [] and snapshots(command) == ["002.ckpt", "003.ckpt"]


def test_relevance_files_are_those_of_the_instruction_in_force(command, monkeypatch):
    folder, make_maps = command.run / "wys" / "relevance", WysDataManager.make_relevance_maps
    seen: list[dict[str, bytes]] = []

    def images() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("*.png")}

    def undo_after_maps(data: WysDataManager, *arguments: object) -> None:
        make_maps(data, *arguments)  # type: ignore
        seen.append(images())
        if len(seen) == 2:
            trainers[0].pipeline.panel.commands.put(ViewerCommand("undo"))

    trainers: list[WysTrainer] = []

    def apply(trainer: WysTrainer) -> None:
        trainers.append(trainer)
        send("apply", ON_TOP, "make the bear red")(trainer)

    monkeypatch.setattr(WysDataManager, "make_relevance_maps", undo_after_maps)
    assert command(step=STEPS - 1, action=apply) is None
    assert len(seen[0]) == 4 and seen[0] != seen[1]
    assert images() == seen[0] and not (folder / "maps.safetensors").exists()


def test_relevance_images_of_later_steps_are_removed_on_resume(command):
    assert command(step=1, action=interrupt) == 130
    image = command.run / "wys" / "relevance" / "frame_000.png"
    image.parent.mkdir()
    image.write_bytes(b"of another instruction")
    assert command("--load-dir", command.run, step=2, action=interrupt) == 130
    assert not image.exists()


def test_an_instruction_without_relevance_has_no_relevance_files(command):
    def apply(trainer: WysTrainer) -> None:
        send("set", "localization", "none")(trainer)
        send("apply", ON_TOP, "make the bear red")(trainer)

    assert command(step=STEPS - 1, action=apply) is None
    assert not list((command.run / "wys" / "relevance").iterdir())


def test_damaged_relevance_maps_are_made_again(command, reference):
    assert command(step=7, action=interrupt) == 130
    path = command.run / "wys" / "relevance" / "maps.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    assert_resume_matches(command, reference)
    assert path.read_bytes() == content


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
