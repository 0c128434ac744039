"""Commands of the viewer in a live run: while it trains and after it has finished."""

import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_wys
from flux2_folder import build_flux2_folder
from nerfstudio.utils.eval_utils import eval_setup
from test_pipeline import small_config

from wys_nerfstudio import relevance
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.visualization import write_png
from wys_nerfstudio.viewer.panel import INSTEAD, ON_TOP, ViewerCommand

pytestmark = pytest.mark.slow
FINISHED = "completed"


@contextmanager
def running(config, then: Callable[[WysTrainer], None]) -> Iterator[WysTrainer]:
    """Train in this thread, as nerfstudio requires, while `then` sends commands from another one and ends the run."""
    config.vis, config.viewer.quit_on_train_completion = "viewer", False
    config.viewer.websocket_port_default = 7400
    config.save_config()
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    errors: list[BaseException] = []

    def run_commands() -> None:
        try:
            then(trainer)
        except BaseException as error:  # noqa: BLE001  raised again in the test's thread
            errors.append(error)
        finally:
            trainer.stop_training = True

    thread = threading.Thread(target=run_commands)
    thread.start()
    try:
        trainer.train()
    finally:
        thread.join(timeout=60)
        trainer.shutdown()
    assert not thread.is_alive()
    if errors:
        raise errors[0]
    yield trainer


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def send(trainer: WysTrainer, action, name: str = "", value=None) -> str:
    """Send a command, wait until it is carried out, and return the status line that follows."""
    panel = trainer.pipeline.panel
    status: list[str] = []
    # Settings are shown right after a command was carried out, and then the status.
    panel.show_settings = lambda *_: setattr(panel, "show_status", lambda *texts: status.append("\n".join(texts)))
    panel.commands.put(ViewerCommand(action, name, value))
    wait(lambda: len(status) > 0)
    del panel.show_settings, panel.show_status
    return status[0]


def pause(trainer: WysTrainer) -> None:
    trainer.training_state = "paused"
    send(trainer, "pause", value=False)  # carried out between two steps; no step follows


def observe(trainer: WysTrainer) -> tuple[torch.Tensor, ...]:
    """Return all that an undo restores: renders, relevance, views and maps."""
    pipeline = trainer.pipeline
    data = pipeline.datamanager
    with trainer.train_lock:
        renders = [pipeline.scene_model.render_view(data.train_dataset.cameras, view) for view in (0, 5)]
        return (
            *(render[name].clone() for render in renders for name in ("rgb", "relevance_value")),
            data.current_views(range(data.num_views)).clone(),
            data.reference_views(range(data.num_views)).clone(),
            data.relevance_maps.clone(),
            data.unclamped_maps.clone(),
        )


def same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def finished(trainer: WysTrainer) -> bool:
    return trainer.training_state == FINISHED


OPTIONS = {"reconstruct_steps": 20, "localize_steps": 4, "edit_steps": 11, "edit_every": 2, "mask_threshold": 0.2}


def test_apply_undo_and_reset_after_the_end_and_a_restart(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    observed: dict[str, tuple[torch.Tensor, ...]] = {}

    def first_process(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        observed["first"] = observe(trainer)
        send(trainer, "set", "guidance_scale", 2.5)
        send(trainer, "apply", INSTEAD, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 49)
        observed["instead"] = observe(trainer)
        send(trainer, "apply", ON_TOP, "make the bear blue")
        wait(lambda: finished(trainer) and trainer.step == 64)
        observed["on top"] = observe(trainer)
        send(trainer, "reset")
        wait(lambda: finished(trainer))

    with running(small_config(ring_scene, editor_folder, tmp_path / "a", **OPTIONS), first_process) as trainer:
        folder = trainer.base_dir
    entries = json.loads((folder / "wys" / "history.json").read_text())
    assert [(e["instruction"], e["start"], e["first_step"]) for e in entries] == [
        ("make the ball blue", "captured", 20),
        ("make the bear red", "instead", 35),
        ("make the bear blue", "on top", 50),
        ("make the bear blue", "reset", 65),
    ]
    assert entries[0]["settings"]["guidance_scale"] == 1.0 and entries[1]["settings"]["guidance_scale"] == 2.5
    assert entries[0]["snapshot"] is None and all((folder / "wys" / e["snapshot"]).is_file() for e in entries[1:])
    assert not same(observed["first"], observed["instead"]) and not same(observed["instead"], observed["on top"])
    current, reference = observed["instead"][4], observed["on top"][5]
    assert torch.equal(current, reference), "on top starts from the current views"

    def after_restart(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        data = trainer.pipeline.datamanager
        everything = range(data.num_views)
        assert torch.equal(data.current_views(everything), data.captured_views(everything)), "reset"
        for undone in ("on top", "instead", "first"):
            status = send(trainer, "undo")
            assert "is undone" in status, status
            assert same(observe(trainer), observed[undone]), undone
        assert trainer.pipeline.settings.current.guidance_scale == 2.5  # set before the Apply
        assert trainer.pipeline.settings.current.instruction == "make the ball blue"
        assert "nothing to undo" in send(trainer, "undo")

    options = {**OPTIONS, "instruction": "make the bear blue"}
    config = small_config(ring_scene, editor_folder, tmp_path / "b", **options)
    config.load_dir = folder / "nerfstudio_models"
    config.vis, config.viewer.quit_on_train_completion = "viewer", False
    config.set_timestamp()
    with running(config, after_restart) as trainer:
        assert len(trainer.pipeline.session.history.entries) == 1


def test_undo_during_editing_pauses_with_the_remaining_steps(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: trainer.pipeline.session.phase is Phase.EDIT and trainer.step > 26)
        pause(trainer)
        before, left = observe(trainer), trainer.last_step - trainer.step
        send(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: trainer.pipeline.session.phase is Phase.EDIT)
        status = send(trainer, "undo")
        assert f"Resume Training continues with the remaining {left} steps" in status
        assert trainer.training_state == "paused" and same(observe(trainer), before)
        assert trainer.last_step - trainer.step == left
        trainer.training_state = "training"
        wait(lambda: finished(trainer))

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then) as trainer:
        assert trainer.step == trainer.last_step == trainer.pipeline.session.schedule.total_steps - 1


def test_refused_commands_are_explained_in_the_status_line(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        settings = trainer.pipeline.settings
        wait(lambda: trainer.pipeline.session.phase is Phase.RECONSTRUCT)
        pause(trainer)
        for action in ("undo", "reset"):
            assert "possible once editing has begun" in send(trainer, action)
        assert "Apply is possible once editing has begun" in send(trainer, "apply", ON_TOP, "make the bear red")
        assert "Preview is possible once" in send(trainer, "preview", value=(0.0,) * 6)
        trainer.training_state = "training"
        wait(lambda: finished(trainer))
        assert "Edit every must be at least 1, not 0" in send(trainer, "set", "edit_every", 0)
        assert settings.current.edit_every == 2
        assert "There is no instruction" in send(trainer, "apply", ON_TOP, "  ")
        assert "shorten it" in send(trainer, "apply", ON_TOP, "make the bear red " * 40)
        assert len(trainer.pipeline.session.history.entries) == 1
        send(trainer, "set", "localization", "none")
        assert settings.current.localization == "none"
        send(trainer, "set", "localization", "relevance-map")
        assert settings.current.localization == "relevance-map"
        send(trainer, "set", "mask_threshold", 1.0)
        assert trainer.pipeline.scene_model.mask_threshold == 1.0
        assert "Nothing in frame" in send(trainer, "preview", value=(0.0,) * 6)
        assert "This is the captured scene." in send(trainer, "reset")
        assert "captured scene already" in send(trainer, "reset")

    options = {**OPTIONS, "reconstruct_steps": 60}
    with running(small_config(ring_scene, editor_folder, tmp_path, **options), then):
        pass


def test_without_maps_localization_changes_with_the_next_apply(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        assert "In effect with the next Apply" in send(trainer, "set", "localization", "relevance-map")
        send(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 45)
        assert trainer.pipeline.datamanager.relevance_maps is not None

    options = {**OPTIONS, "localization": "none"}
    with running(small_config(ring_scene, editor_folder, tmp_path, **options), then):
        pass


def mask_outputs(trainer: WysTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance and edit mask as the viewer shows them, for the first view."""
    pipeline = trainer.pipeline
    with trainer.train_lock:
        pipeline.eval()
        outputs = pipeline.scene_model.get_outputs_for_camera(pipeline.datamanager.cameras[0:1])
        pipeline.train()
    return outputs["relevance_value"].clone(), outputs["edit_mask"].clone()


def test_a_switch_to_none_and_back_restores_the_mask_outputs(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        relevance, mask = mask_outputs(trainer)
        threshold = float(relevance.median())
        send(trainer, "set", "mask_threshold", threshold)
        relevance, mask = mask_outputs(trainer)
        assert 0 < float(mask.float().mean()) < 1
        send(trainer, "set", "localization", "none")
        everywhere, full = mask_outputs(trainer)
        assert (everywhere == 1).all() and (full == 1).all()
        send(trainer, "set", "localization", "relevance-field")
        for restored, before in zip(mask_outputs(trainer), (relevance, mask), strict=True):
            assert torch.equal(restored, before)

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then):
        pass


def write_masks(scene: Path, folder: Path) -> torch.Tensor:
    """Write masks of the left half of all views and return one."""
    left_half = torch.zeros(32, 40)
    left_half[:, :20] = 1
    for image in (scene / "images").iterdir():
        write_png(folder / image.name, left_half)
    return left_half


def test_with_a_masks_folder_each_offered_localization_works(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    left_half = write_masks(ring_scene, tmp_path / "masks")

    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        pipeline = trainer.pipeline
        assert pipeline.settings.localizations == ("masks", "none")
        for localization in ("none", "masks", "none", "masks"):
            assert send(trainer, "set", "localization", localization).endswith("\n"), "no message"
            assert pipeline.settings.current.localization == localization
            with trainer.train_lock:
                mask = pipeline.session.edit_loop.prepare_edit(3).mask
            assert torch.equal(mask, left_half > 0 if localization == "masks" else torch.ones(32, 40) > 0)
        status = send(trainer, "set", "localization", "relevance-field")
        assert "Localization relevance-field is not available in this run; choose masks or none." in status
        assert pipeline.settings.current.localization == "masks"

    options = {**OPTIONS, "localization": "masks", "masks_dir": tmp_path / "masks"}
    with running(small_config(ring_scene, editor_folder, tmp_path / "run", **options), then):
        pass


def test_a_preview_equals_the_next_edit_and_changes_nothing(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    shown: list = []

    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        pipeline = trainer.pipeline
        monkeypatch.setattr(pipeline.panel, "show_images", lambda *arguments: shown.append(arguments))
        before, edits = observe(trainer), pipeline.session.edit_loop.edits
        camera = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[3]
        send(trainer, "set", "mask_threshold", 0.0)
        send(trainer, "preview", value=(*camera[:, 3].tolist(), *(-camera[:, 2]).tolist()))
        assert pipeline.session.edit_loop.edits == edits and same(observe(trainer), before)
        ((caption, (captured, mask, edited)),) = shown
        assert pipeline.datamanager.view_names[3] in caption
        assert torch.equal(captured, pipeline.datamanager.captured_views([3])[0]) and mask.all()
        monkeypatch.setattr("wys_nerfstudio.training.schedule.view_of_edit", lambda *arguments: 3)
        with trainer.train_lock:
            pipeline.session.edit_loop.edit(trainer.step, trainer.base_dir / "wys")
        assert torch.allclose(pipeline.datamanager.current_views([3])[0], edited, atol=0.5 / 255 + 1e-6)

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then):
        pass


def test_a_preview_of_another_instruction_uses_that_views_map(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    shown: list = []

    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        pipeline = trainer.pipeline
        data = pipeline.datamanager
        monkeypatch.setattr(pipeline.panel, "show_images", lambda *arguments: shown.append(arguments))
        before = observe(trainer)
        camera = data.train_dataset.cameras.camera_to_worlds[3]
        where = (*camera[:, 3].tolist(), *(-camera[:, 2]).tolist())
        send(trainer, "preview", "make the bear red", where)
        assert pipeline.settings.current.instruction == "make the ball blue" and same(observe(trainer), before)
        ((caption, (_, mask, _)),) = shown
        assert caption.startswith('"make the bear red" in frame')
        # The mask that an Apply of this instruction gives this view without the field.
        send(trainer, "set", "localization", "relevance-map")
        send(trainer, "apply", INSTEAD, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 49)
        view_map = relevance.resize(data.relevance_maps[3:4], *data.view_size)[0]
        assert torch.equal(mask[..., 0] > 0, view_map >= pipeline.settings.current.mask_threshold)

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then):
        pass


def test_the_nearest_training_view_is_shown_and_the_client_moved_there(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    shown: list = []
    moved: list = []

    def show(trainer: WysTrainer, view: int) -> tuple[str, list[torch.Tensor]]:
        camera = trainer.pipeline.datamanager.cameras.camera_to_worlds[view]
        where = (*camera[:, 3].tolist(), *(-camera[:, 2]).tolist())
        shown.clear()
        trainer.pipeline.panel.commands.put(ViewerCommand("view", value=where, client=7))
        wait(lambda: len(shown) > 0)
        return shown[0]

    def then(trainer: WysTrainer) -> None:
        pipeline = trainer.pipeline
        data, loop = pipeline.datamanager, pipeline.session.edit_loop
        monkeypatch.setattr(pipeline.panel, "show_images", lambda *arguments: shown.append(arguments))
        monkeypatch.setattr(pipeline.panel, "move_camera", lambda *arguments: moved.append(arguments))
        wait(lambda: trainer.step > 0)
        caption, images = show(trainer, 3)
        assert caption.startswith(data.view_names[3]) and caption.endswith(": captured (not edited yet)")
        assert len(images) == 1 and torch.equal(images[0], data.captured_views([3])[0])
        wait(lambda: finished(trainer))
        before = observe(trainer)
        edited = min(data.edited_views)
        caption, (captured, current, overlay) = show(trainer, edited)
        assert caption == f"{data.view_names[edited]} at step {trainer.step + 1}: captured, edited, edited pixels"
        assert torch.equal(captured, data.captured_views([edited])[0])
        assert torch.equal(current, data.current_views([edited])[0]) and not torch.equal(current, captured)
        assert torch.equal(overlay[:, 20:], 0.4 * current[:, 20:]), "dimmed outside the mask"
        assert ((overlay - 0.4 * current)[:, :20] > 0.1).float().mean() > 0.9, "tinted inside"
        (client, camera) = moved[-1]
        assert client == 7
        corrected = pipeline.scene_model.pose_corrected_camera(data.cameras, edited).camera_to_worlds
        assert torch.equal(camera.camera_to_worlds, corrected)
        assert not torch.equal(corrected, data.cameras.camera_to_worlds[edited : edited + 1])
        assert same(observe(trainer), before)
        loop.paused = True
        send(trainer, "apply", ON_TOP, "make the bear red")
        caption, images = show(trainer, edited)
        assert caption.endswith(": captured, edited (not edited by this instruction yet)") and len(images) == 2

    write_masks(ring_scene, tmp_path / "masks")
    options = {**OPTIONS, "localization": "masks", "masks_dir": tmp_path / "masks"}
    with running(small_config(ring_scene, editor_folder, tmp_path / "run", **options), then):
        pass


def test_an_export_equals_that_of_wys_export(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: trainer.step > 0)
        assert "There is nothing to export yet: no view is edited." in send(trainer, "export")
        wait(lambda: finished(trainer))
        before, folder = observe(trainer), trainer.base_dir / "export-34"

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("wys_nerfstudio.export.data_set.ply_file", fail)
            status = send(trainer, "export")
        assert f'The data set could not be written to "{folder}": No space left on device.' in status
        assert not folder.exists() and finished(trainer)
        edited = len(trainer.pipeline.datamanager.edited_views)
        status = send(trainer, "export")
        assert f"Wrote 13 views, {edited} of them edited, and " in status and f'to "{folder}".' in status
        assert f'move or remove "{folder}" to write it again' in send(trainer, "export")
        assert same(observe(trainer), before)

    with running(small_config(ring_scene, editor_folder, tmp_path / "out", **OPTIONS), then) as trainer:
        folder = trainer.base_dir / "export-34"
    run_wys(monkeypatch, "export", trainer.base_dir, "-o", tmp_path / "data")
    files = {path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for file in files:
        if file.suffix == ".png":
            assert (folder / file).read_bytes() == (tmp_path / "data" / file).read_bytes()
    live, later = (json.loads((path / "transforms.json").read_text()) for path in (folder, tmp_path / "data"))
    poses = [[frame.pop("transform_matrix") for frame in meta["frames"]] for meta in (live, later)]
    assert live == later
    torch.testing.assert_close(*map(torch.tensor, poses))


def test_apply_resumes_paused_training(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: trainer.pipeline.session.phase is Phase.EDIT and trainer.step > 26)
        pause(trainer)
        send(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: finished(trainer) and trainer.pipeline.settings.current.instruction == "make the bear red")

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then):
        pass


def test_live_changes_are_resumed_unless_typed_otherwise(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        send(trainer, "set", "mask_threshold", 0.45)
        send(trainer, "set", "guidance_scale", 2.5)
        send(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 49)

    with running(small_config(ring_scene, editor_folder, tmp_path / "a", **OPTIONS), then) as trainer:
        folder = trainer.base_dir
    typed = yaml.load((folder / "config.yml").read_text(), Loader=yaml.Loader).pipeline
    assert (typed.instruction, typed.mask_threshold) == ("make the ball blue", 0.2)
    evaluated = eval_setup(folder / "config.yml", test_mode="test")[1]
    assert evaluated.settings.current.instruction == "make the bear red"
    assert evaluated.settings.current.mask_threshold == evaluated.scene_model.mask_threshold == 0.45

    # The same command once more, but for one setting.
    config = small_config(ring_scene, editor_folder, tmp_path / "b", **OPTIONS)
    config.max_num_iterations = None
    config.pipeline.guidance_scale, config.load_dir = 7.0, folder / "nerfstudio_models"
    config.vis, config.viewer.quit_on_train_completion = "viewer", False
    config.set_timestamp()
    assert config.max_num_iterations == 50
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    settings = trainer.pipeline.settings.current
    assert (settings.instruction, settings.mask_threshold, settings.guidance_scale) == ("make the bear red", 0.45, 7.0)
    trainer.shutdown()


def test_a_client_that_disconnects_during_an_update_is_ignored(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    updates = []

    def disconnected(*_: object) -> None:
        updates.append(True)
        raise KeyError(3)

    def then(trainer: WysTrainer) -> None:
        trainer.viewer_state.update_scene = trainer.viewer_state._trigger_rerender = disconnected  # type: ignore
        assert send(trainer, "set", "guidance_scale", 2.0)
        wait(lambda: finished(trainer))

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then) as trainer:
        assert len(updates) > 3 and trainer.pipeline.settings.current.guidance_scale == 2.0


def test_guidance_that_the_editor_lacks_is_refused_in_the_status_line(ring_scene: Path, tmp_path: Path) -> None:
    def then(trainer: WysTrainer) -> None:
        settings = trainer.pipeline.settings
        assert (settings.current.guidance_scale, settings.current.image_guidance_scale) == (4.0, 1.0)
        assert "has no image guidance" in send(trainer, "set", "image_guidance_scale", 1.5)
        assert settings.current.image_guidance_scale == 1.0
        assert "refused" not in send(trainer, "set", "guidance_scale", 2.0) and settings.current.guidance_scale == 2.0

    editor = build_flux2_folder(tmp_path / "editor")
    options = {**OPTIONS, "guidance_scale": None, "image_guidance_scale": None}
    with running(small_config(ring_scene, editor, tmp_path / "out", **options), then):
        pass


@pytest.mark.parametrize("seed", [0])
def test_300_random_commands_leave_a_consistent_run(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)

    def random_command() -> ViewerCommand:
        action = draw.choice(["set"] * 8 + ["pause", "apply", "undo", "reset", "preview", "view", "export"])
        if action == "set":
            name, values = draw.choice(
                [("mask_threshold", [0.0, 0.3, 1.0, 2.0]), ("guidance_scale", [0.5, 7.5]), ("edit_every", [0, 1, 3]),
                 ("image_guidance_scale", [1.0, 1.5]), ("edit_count", [0, 1, 2]),
                 ("localization", ["none", "relevance-map", "relevance-field"])]
            )  # fmt: skip
            return ViewerCommand("set", name, draw.choice(values))
        if action == "apply":
            return ViewerCommand(
                "apply", draw.choice([ON_TOP, INSTEAD]), draw.choice(["make the bear red", "", "make it red"])
            )
        camera = tuple(draw.uniform(-1, 1) for _ in range(6))
        return ViewerCommand(
            action, value={"pause": draw.random() < 0.5, "preview": camera, "view": camera}.get(action)
        )

    def then(trainer: WysTrainer) -> None:
        panel = trainer.pipeline.panel
        for number in range(300):
            if number == 50:  # most commands are refused before
                wait(lambda: trainer.step >= trainer.pipeline.session.schedule.edit_start)
            panel.commands.put(random_command())
            time.sleep(draw.uniform(0, 0.05))
            if trainer.training_state == "paused" and draw.random() < 0.3:
                trainer.training_state = "training"
        wait(panel.commands.empty)
        send(trainer, "pause", value=False)
        wait(lambda: trainer.training_state != "paused" or setattr(trainer, "training_state", "training") is not None)
        wait(lambda: finished(trainer))

    options = {**OPTIONS, "edit_steps": 4, "diffusion_steps": 2}
    with running(small_config(ring_scene, editor_folder, tmp_path, **options), then) as trainer:
        pipeline = trainer.pipeline
        settings = pipeline.settings.current
        assert settings.edit_every >= 1 and 0 <= settings.mask_threshold <= 1
        assert pipeline.scene_model.mask_threshold == settings.mask_threshold
        history = trainer.pipeline.session.history
        kept = {path.name for path in (trainer.base_dir / "wys" / "history").iterdir()}
        newest = [entry.snapshot for entry in history.entries[-pipeline.config.history_size :] if entry.snapshot]
        # Undo removes the newest ones; older ones than `history_size` were removed before.
        assert kept == {Path(snapshot).name for snapshot in newest[len(newest) - len(kept) :]}
        assert all(torch.isfinite(value).all() for value in pipeline.scene_model.state_dict().values())
