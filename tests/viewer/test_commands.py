"""A live run: instructions applied, taken back and previewed while it trains and after it has finished."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from test_pipeline import small_config

from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.viewer.panel import INSTEAD, ON_TOP, ViewerCommand

pytestmark = pytest.mark.slow
FINISHED = "completed"


@contextmanager
def running(config, then: Callable[[WysTrainer], None]) -> Iterator[WysTrainer]:
    """Trains in this thread, as nerfstudio wants it, while `then` asks for things in another; it ends the run, too."""
    config.vis, config.viewer.quit_on_train_completion = "viewer", False
    config.viewer.websocket_port_default = 7400
    config.save_config()
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            then(trainer)
        except BaseException as error:  # noqa: BLE001  handed to the test below
            errors.append(error)
        finally:
            trainer.stop_training = True

    thread = threading.Thread(target=ask)
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
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def ask(trainer: WysTrainer, action, name: str = "", value=None) -> str:
    """Asks, waits until it is carried out, and returns what the status line says about it."""
    controls = trainer.pipeline.panel
    said: list[str] = []
    # Settings are shown right after a request was carried out, and then the status.
    controls.show_settings = lambda *_: setattr(controls, "show_status", said.append)
    controls.commands.put(ViewerCommand(action, name, value))
    wait(lambda: len(said) > 0)
    del controls.show_settings, controls.show_status
    return said[0]


def pause(trainer: WysTrainer) -> None:
    trainer.training_state = "paused"
    ask(trainer, "pause", value=False)  # taken between two steps, and from now on there is no next step


def look(trainer: WysTrainer) -> tuple[torch.Tensor, ...]:
    """Everything that must come back: renders, relevance, views and maps."""
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


def test_apply_undo_and_reset_on_a_finished_run_and_after_a_restart(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    looks: dict[str, tuple[torch.Tensor, ...]] = {}

    def first_process(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        looks["first"] = look(trainer)
        ask(trainer, "set", "guidance_scale", 2.5)
        ask(trainer, "apply", INSTEAD, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 49)
        looks["instead"] = look(trainer)
        ask(trainer, "apply", ON_TOP, "make the bear blue")
        wait(lambda: finished(trainer) and trainer.step == 64)
        looks["on top"] = look(trainer)
        ask(trainer, "reset")
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
    assert not same(looks["first"], looks["instead"]) and not same(looks["instead"], looks["on top"])
    current, reference = looks["instead"][4], looks["on top"][5]
    assert torch.equal(current, reference), "on top of what was there"

    def after_restart(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        data = trainer.pipeline.datamanager
        everything = range(data.num_views)
        assert torch.equal(data.current_views(everything), data.captured_views(everything)), "it was reset"
        for undone in ("on top", "instead", "first"):
            said = ask(trainer, "undo")
            assert "is undone" in said, said
            assert same(look(trainer), looks[undone]), undone
        assert trainer.pipeline.settings.current.guidance_scale == 2.5  # what was set before the Apply, not by it
        assert trainer.pipeline.settings.current.instruction == "make the ball blue"
        assert "nothing to undo" in ask(trainer, "undo")

    options = {**OPTIONS, "instruction": "make the bear blue"}
    config = small_config(ring_scene, editor_folder, tmp_path / "b", **options)
    config.load_dir = folder / "nerfstudio_models"
    config.vis, config.viewer.quit_on_train_completion = "viewer", False
    config.set_timestamp()
    with running(config, after_restart) as trainer:
        assert len(trainer.pipeline.session.history.entries) == 1


def test_undo_in_the_middle_of_editing_waits_and_then_goes_on_with_what_was_left(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: trainer.pipeline.session.phase is Phase.EDIT and trainer.step > 26)
        pause(trainer)
        before, left = look(trainer), trainer.last_step - trainer.step
        ask(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: trainer.pipeline.session.phase is Phase.EDIT)
        said = ask(trainer, "undo")
        assert f"goes on with the {left} steps that were left" in said
        assert trainer.training_state == "paused" and same(look(trainer), before)
        assert trainer.last_step - trainer.step == left
        trainer.training_state = "training"
        wait(lambda: finished(trainer))

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then) as trainer:
        assert trainer.step == trainer.last_step == trainer.pipeline.session.schedule.total_steps - 1


def test_what_a_run_cannot_take_is_refused_in_the_status_line(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        config = trainer.pipeline.config
        wait(lambda: trainer.pipeline.session.phase is Phase.RECONSTRUCT)
        pause(trainer)
        for action in ("undo", "reset"):
            assert "possible once editing has begun" in ask(trainer, action)
        assert "Apply is possible once editing has begun" in ask(trainer, "apply", ON_TOP, "make the bear red")
        assert "Preview is possible once" in ask(trainer, "preview", value=(0.0,) * 6)
        trainer.training_state = "training"
        wait(lambda: finished(trainer))
        assert "--pipeline.edit-every must be at least 1, not 0" in ask(trainer, "set", "edit_every", 0)
        assert config.edit_every == 2
        assert "There is no instruction" in ask(trainer, "apply", ON_TOP, "  ")
        assert "shorten it" in ask(trainer, "apply", ON_TOP, "make the bear red " * 40)
        assert len(trainer.pipeline.session.history.entries) == 1
        ask(trainer, "set", "localization", "none")
        assert config.localization == "none"
        ask(trainer, "set", "localization", "relevance-map")
        assert config.localization == "relevance-map"
        ask(trainer, "set", "mask_threshold", 1.0)
        assert trainer.pipeline.scene_model.mask_threshold == 1.0
        assert "Nothing in frame" in ask(trainer, "preview", value=(0.0,) * 6)
        assert "This is the captured scene." in ask(trainer, "reset")
        assert "captured scene already" in ask(trainer, "reset")

    options = {**OPTIONS, "reconstruct_steps": 60}
    with running(small_config(ring_scene, editor_folder, tmp_path, **options), then):
        pass


def test_a_run_without_relevance_takes_another_localization_with_the_next_instruction(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        assert "From the next Apply on" in ask(trainer, "set", "localization", "relevance-map")
        ask(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 45)
        assert "relevance" in trainer.pipeline.datamanager.cached_batch

    options = {**OPTIONS, "localization": "none"}
    with running(small_config(ring_scene, editor_folder, tmp_path, **options), then):
        pass


def test_a_preview_is_what_the_next_edit_would_be_and_leaves_no_trace(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    shown: list = []

    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        pipeline = trainer.pipeline
        monkeypatch.setattr(pipeline.panel, "show_preview", lambda *arguments: shown.append(arguments))
        before, edits = look(trainer), pipeline.session.edit_loop.edits
        camera = pipeline.datamanager.train_dataset.cameras.camera_to_worlds[3]
        ask(trainer, "set", "mask_threshold", 0.0)
        ask(trainer, "preview", value=(*camera[:, 3].tolist(), *(-camera[:, 2]).tolist()))
        assert pipeline.session.edit_loop.edits == edits and same(look(trainer), before)
        ((caption, (captured, mask, edited)),) = shown
        assert pipeline.datamanager.view_names[3] in caption
        assert torch.equal(captured, pipeline.datamanager.captured_views([3])[0]) and mask.all()
        monkeypatch.setattr("wys_nerfstudio.training.schedule.view_of_edit", lambda *arguments: 3)
        with trainer.train_lock:
            pipeline.session.edit_loop.edit(trainer.step, trainer.base_dir / "wys")
        assert torch.allclose(pipeline.datamanager.current_views([3])[0], edited, atol=0.5 / 255 + 1e-6)

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then):
        pass


def test_a_preview_of_what_is_typed_asks_the_editor_about_that_view_alone(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    shown: list = []

    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        pipeline = trainer.pipeline
        data = pipeline.datamanager
        monkeypatch.setattr(pipeline.panel, "show_preview", lambda *arguments: shown.append(arguments))
        before = look(trainer)
        camera = data.train_dataset.cameras.camera_to_worlds[3]
        where = (*camera[:, 3].tolist(), *(-camera[:, 2]).tolist())
        ask(trainer, "preview", "make the bear red", where)
        assert pipeline.config.instruction == "make the ball blue" and same(look(trainer), before)
        ((caption, (_, mask, _)),) = shown
        assert caption.startswith('"make the bear red" in frame')
        # The very mask that an Apply of this instruction would give this view without the field.
        ask(trainer, "set", "localization", "relevance-map")
        ask(trainer, "apply", INSTEAD, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 49)
        assert torch.equal(mask[..., 0] > 0, data.relevance_maps[3] >= pipeline.config.mask_threshold)

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then):
        pass


def test_apply_goes_on_although_training_was_paused(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: trainer.pipeline.session.phase is Phase.EDIT and trainer.step > 26)
        pause(trainer)
        ask(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: finished(trainer) and trainer.pipeline.settings.current.instruction == "make the bear red")

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then):
        pass


def test_live_changes_outlive_the_process_unless_typed_otherwise(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    def then(trainer: WysTrainer) -> None:
        wait(lambda: finished(trainer))
        ask(trainer, "set", "mask_threshold", 0.45)
        ask(trainer, "set", "guidance_scale", 2.5)
        ask(trainer, "apply", ON_TOP, "make the bear red")
        wait(lambda: finished(trainer) and trainer.step == 49)

    with running(small_config(ring_scene, editor_folder, tmp_path / "a", **OPTIONS), then) as trainer:
        folder = trainer.base_dir
    kept = yaml.load((folder / "config.yml").read_text(), Loader=yaml.Loader)
    assert kept.pipeline.mask_threshold == 0.45 and kept.pipeline.instruction == "make the bear red"
    assert kept.max_num_iterations == 50

    # The same command once more, but for one setting.
    config = small_config(ring_scene, editor_folder, tmp_path / "b", **OPTIONS)
    assert (config.pipeline.instruction, config.pipeline.mask_threshold) == ("make the ball blue", 0.2)
    config.pipeline.guidance_scale, config.load_dir = 7.0, folder / "nerfstudio_models"
    config.vis, config.viewer.quit_on_train_completion = "viewer", False
    config.set_timestamp()
    assert (config.pipeline.instruction, config.pipeline.mask_threshold) == ("make the bear red", 0.45)
    assert config.pipeline.guidance_scale == 7.0


def test_a_client_that_leaves_while_it_is_told_ends_nothing(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    told = []

    def gone(*_: object) -> None:
        told.append(True)
        raise KeyError(3)

    def then(trainer: WysTrainer) -> None:
        trainer.viewer_state.update_scene = trainer.viewer_state._trigger_rerender = gone  # type: ignore
        assert ask(trainer, "set", "guidance_scale", 2.0)
        wait(lambda: finished(trainer))

    with running(small_config(ring_scene, editor_folder, tmp_path, **OPTIONS), then) as trainer:
        assert len(told) > 3 and trainer.pipeline.settings.current.guidance_scale == 2.0


@pytest.mark.parametrize("seed", [0])
def test_300_random_requests_break_nothing(ring_scene: Path, editor_folder: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    def request() -> ViewerCommand:
        action = draw.choice(["set"] * 8 + ["pause", "apply", "undo", "reset", "preview"])
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
        return ViewerCommand(action, value={"pause": draw.random() < 0.5, "preview": camera}.get(action))

    def then(trainer: WysTrainer) -> None:
        controls = trainer.pipeline.panel
        for number in range(300):
            if number == 50:  # the first ones come too early for most things, however slow the machine
                wait(lambda: trainer.step >= trainer.pipeline.session.schedule.edit_start)
            controls.commands.put(request())
            time.sleep(draw.uniform(0, 0.05))
            if trainer.training_state == "paused" and draw.random() < 0.3:
                trainer.training_state = "training"
        wait(controls.commands.empty)
        ask(trainer, "pause", value=False)
        wait(lambda: trainer.training_state != "paused" or setattr(trainer, "training_state", "training") is not None)
        wait(lambda: finished(trainer))

    options = {**OPTIONS, "edit_steps": 4, "diffusion_steps": 2}
    with running(small_config(ring_scene, editor_folder, tmp_path, **options), then) as trainer:
        pipeline = trainer.pipeline
        assert pipeline.config.edit_every >= 1 and 0 <= pipeline.config.mask_threshold <= 1
        assert pipeline.scene_model.mask_threshold == pipeline.config.mask_threshold
        history = trainer.pipeline.session.history
        kept = {path.name for path in (trainer.base_dir / "wys" / "history").iterdir()}
        assert kept == {Path(e.snapshot).name for e in history.entries if e.snapshot}
        assert all(torch.isfinite(value).all() for value in pipeline.scene_model.state_dict().values())
