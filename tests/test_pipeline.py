"""The pipeline in training: what a view looks like when it is edited, and what editing does to ray batches."""

import copy
import gc
import json
import math
import threading
import weakref
from pathlib import Path

import pytest
import torch
from conftest import sentence_of, write_ring_scene
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from PIL import Image

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.editing import Editor
from wys_nerfstudio.evaluation.metrics import psnr
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training.scene import EditInput
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.visualization import read_png, write_png


def small_config(scene: Path, editor: Path, output: Path, **options) -> WysTrainerConfig:
    config: WysTrainerConfig = copy.deepcopy(wys_tiny.config)  # type: ignore
    config.output_dir, config.vis = output, "tensorboard"
    config.machine.device_type = "cpu"
    config.viewer.quit_on_train_completion = True
    config.pipeline.datamanager.data = scene
    config.pipeline.instruction, config.pipeline.editor = "make the ball blue", str(editor)
    config.pipeline.datamanager.train_num_rays_per_batch = 512
    config.pipeline.datamanager.edit_num_rays_per_batch = 128
    config.pipeline.model.num_nerf_samples_per_ray = 12
    config.pipeline.model.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3")
    for name, value in options.items():
        setattr(config.pipeline, name, value)
    config.set_timestamp()
    return config


def build_trainer(config: WysTrainerConfig) -> WysTrainer:
    torch.manual_seed(0)
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def step(trainer: WysTrainer, number: int) -> dict[str, torch.Tensor]:
    trainer.pipeline.train()
    with trainer.train_lock:
        for callback in trainer.callbacks:
            callback.run_callback_at_location(number, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
    losses = trainer.train_iteration(number)[1]
    for callback in trainer.callbacks:
        callback.run_callback_at_location(number, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
    return losses


RECONSTRUCTED = {"reconstruct_steps": 200, "localize_steps": 3}
"""Options of `trained`."""


@pytest.fixture(scope="module")
def checkpoint(ring_scene: Path, editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene reconstructed well enough to tell its views apart."""
    output = tmp_path_factory.mktemp("reconstructed")
    trainer = build_trainer(small_config(ring_scene, editor_folder, output, **RECONSTRUCTED))
    for number in range(200):
        step(trainer, number)
    trainer.save_checkpoint(199)
    return trainer.checkpoint_dir / "step-000000199.ckpt"


@pytest.fixture
def trained(checkpoint: Path, ring_scene: Path, editor_folder: Path, tmp_path: Path) -> WysTrainer:
    """A run of its own that continues after the reconstruction."""
    config = small_config(ring_scene, editor_folder, tmp_path, **RECONSTRUCTED)
    config.load_checkpoint = checkpoint
    return build_trainer(config)


@pytest.mark.parametrize("test_mode", ["test", "inference"])
def test_data_that_has_changed_ends_other_commands_with_a_sentence(
    test_mode, editor_folder: Path, tmp_path: Path
) -> None:
    scene = write_ring_scene(tmp_path / "scene", views=4)
    config = small_config(scene, editor_folder, tmp_path)
    Image.new("RGB", (50, 32)).save(scene / "images" / "frame_002.png")
    sentence = sentence_of(lambda: config.pipeline.setup(device="cpu", test_mode=test_mode))
    assert "All views must have one size, and frame_000.png is 40x32 while frame_002.png is 50x32" in sentence


def test_a_render_of_a_view_is_closest_to_that_view(trained: WysTrainer) -> None:
    """With wrong poses or another view's appearance another view would be closest: each has its own tint."""
    data, model = trained.pipeline.datamanager, trained.pipeline.scene_model
    for view in range(data.num_views):
        rgb = model.render_view(data.train_dataset.cameras, view)["rgb"]
        similarity = [psnr(rgb, data.captured_views([other])[0]) for other in range(data.num_views)]
        assert max(range(data.num_views), key=similarity.__getitem__) == view


def test_a_render_of_a_view_uses_the_training_rays(trained: WysTrainer, monkeypatch) -> None:
    data, model = trained.pipeline.datamanager, trained.pipeline.scene_model
    assert model.camera_optimizer.pose_adjustment.abs().max() > 1e-4, "poses were learned"
    bundles, render = [], model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda bundle: (bundles.append(bundle), render(bundle))[1])
    model.render_view(data.train_dataset.cameras, 4)
    height, width = data.view_size
    indices = torch.stack([torch.full((height * width,), 4), *torch.arange(height * width).view(1, -1).div(
        torch.tensor([[width], [1]]), rounding_mode="floor").remainder(torch.tensor([[height], [width]]))], dim=-1)  # fmt: skip
    bundle = data.train_ray_generator(indices)
    model.camera_optimizer.apply_to_raybundle(bundle)
    torch.testing.assert_close(torch.cat([b.origins for b in bundles]), bundle.origins, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([b.directions for b in bundles]), bundle.directions, atol=1e-5, rtol=0)


def test_localization_trains_the_relevance_head_only(trained: WysTrainer) -> None:
    model = trained.pipeline.scene_model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = [step(trained, number) for number in range(200, 203)]
    assert trained.pipeline.scene_model.phase is Phase.LOCALIZE
    assert all(set(loss) == {"relevance_loss"} for loss in losses)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all("mlp_relevance" in key for key in changed)


def write_ball_masks(scene: Path, folder: Path) -> Path:
    """Write one mask per view: white on the ball, which has one color."""
    for path in (scene / "images").iterdir():
        pixels = read_png(path)
        write_png(folder / path.name, (pixels == pixels[16, 20]).all(dim=-1).float())
    return folder


def test_given_masks_need_no_relevance_field(
    checkpoint: Path, ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    masks_dir = write_ball_masks(ring_scene, tmp_path / "given")
    options = {**RECONSTRUCTED, "localization": "masks", "masks_dir": masks_dir}
    config = small_config(ring_scene, editor_folder, tmp_path, **options)
    assert config.pipeline.schedule().localize_steps == 0
    config.load_checkpoint = checkpoint  # of a run that would have been localized
    trainer = build_trainer(config)
    data, model = trainer.pipeline.datamanager, trainer.pipeline.scene_model
    model.phase = Phase.RECONSTRUCT
    assert not model.render_view(data.cameras, 0)["relevance_value"].any()
    losses = step(trainer, 200)
    assert trainer.pipeline.session.schedule.localize_steps == 0 and model.phase is Phase.EDIT
    assert "rgb_loss" in losses and "relevance_loss" not in losses
    (record,) = map(json.loads, (trainer.base_dir / "wys" / "edits.jsonl").read_text().splitlines())
    assert record["mask_fraction"] == pytest.approx(float(data.relevance_maps[0].float().mean()), abs=1e-3)
    model.field.relevance_hull.relevance.fill_(0.25)
    torch.testing.assert_close(model.render_view(data.cameras, 0)["relevance_value"], torch.full((32, 40, 1), 0.25))
    trainer.pipeline.session.apply("make the ball blue", 200, trainer.pipeline.session.captured_scene())
    assert trainer.pipeline.session.schedule.localize_steps == 0
    step(trainer, 201)
    assert model.phase is Phase.EDIT


def test_the_edit_phase_starts_with_an_edit_and_fixed_cameras(trained: WysTrainer) -> None:
    pipeline = trained.pipeline
    for number in range(200, 203):
        step(trained, number)
    pipeline.settings.update(mask_threshold=0.0)
    poses = pipeline.scene_model.camera_optimizer.pose_adjustment.clone()
    losses = step(trained, 203)
    assert set(losses) == {"rgb_loss", "interlevel_loss", "distortion_loss", "relevance_loss"}
    (record,) = map(json.loads, (trained.base_dir / "wys" / "edits.jsonl").read_text().splitlines())
    view = pipeline.datamanager.view_names.index(record["view"])
    assert record["mask_fraction"] == 1.0 and pipeline.datamanager.edited_views == {view}
    assert not torch.equal(
        *(f([view]) for f in (pipeline.datamanager.captured_views, pipeline.datamanager.current_views))
    )
    assert torch.equal(poses, pipeline.scene_model.camera_optimizer.pose_adjustment)
    assert pipeline.datamanager.get_train_rays_per_batch() == 128


def test_the_hull_is_built_with_corrected_poses(trained: WysTrainer, monkeypatch) -> None:
    """The hull is built from clamped and unclamped maps, corrected poses, and one depth per latent."""
    pipeline, model = trained.pipeline, trained.pipeline.scene_model
    data, hull, calls = pipeline.datamanager, model.field.relevance_hull, []
    for number in range(200, 204):
        step(trained, number)
    assert hull.known
    monkeypatch.setattr(type(hull), "known", False)
    monkeypatch.setattr(hull, "build", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(pipeline.config, "edit_resolution", 40)
    before, unclamped_maps = (data.relevance_maps, data.unclamped_maps), torch.rand(data.num_views, 4, 5)
    data.set_relevance(before[0], unclamped_maps)
    pipeline.session.edit_loop.build_visual_hull()
    data.set_relevance(*before)
    ((to_world, cameras, maps, unclamped, depths, on_surfaces),) = calls
    assert not on_surfaces
    positions = torch.rand(9, 3)
    torch.testing.assert_close(model.field.to_unit_cube(to_world(positions)), positions, atol=1e-4, rtol=0)
    corrected = torch.cat(
        [
            model.pose_corrected_camera(data.train_dataset.cameras, view).camera_to_worlds
            for view in range(data.num_views)
        ]
    )
    assert torch.equal(cameras.camera_to_worlds, corrected)
    assert not torch.equal(corrected, data.train_dataset.cameras.camera_to_worlds)
    assert torch.equal(maps, before[0])
    assert torch.equal(unclamped, unclamped_maps)
    factor = 32 // pipeline.editor().latent_size(32, 40)[0]
    middle = slice(factor // 2, None, factor)
    for view in (0, 5):
        render = model.render_view(data.train_dataset.cameras, view)["depth"]
        assert depths.shape == (data.num_views, 32 // factor, 40 // factor)
        # The center of a latent lies between pixels: within the range of its neighbors.
        near = torch.nn.functional.unfold(render.permute(2, 0, 1)[None], 3, padding=1)
        near = near.view(9, *render.shape[:2])[:, middle, middle]
        low, high = near.amin(dim=0), near.amax(dim=0)
        assert float(((depths[view] >= low - 0.05) & (depths[view] <= high + 0.05)).float().mean()) > 0.9


def test_every_phase_draws_its_own_number_of_rays(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    config = small_config(ring_scene, editor_folder, tmp_path, reconstruct_steps=1, localize_steps=1)
    config.pipeline.datamanager.localize_num_rays_per_batch = 64
    trainer, drawn = build_trainer(config), []
    for number in range(3):
        step(trainer, number)
        drawn.append(trainer.pipeline.datamanager.get_train_rays_per_batch())
    assert drawn == [512, 64, 128]


def test_the_hull_is_built_once_per_instruction(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(small_config(ring_scene, editor_folder, tmp_path, reconstruct_steps=0, localize_steps=1))
    pipeline, hull = trainer.pipeline, trainer.pipeline.scene_model.field.relevance_hull
    with trainer.train_lock:
        pipeline.session.enter_phase(Phase.LOCALIZE)
        assert not hull.known  # the relevance head is not trained yet
        pipeline.session.enter_phase(Phase.EDIT)
        assert hull.known
        hull.relevance.fill_(0.25)
        pipeline.session.enter_phase(Phase.EDIT)  # as in a resumed run, whose scene is edited already
        assert bool((hull.relevance == 0.25).all())
        pipeline.session.apply("make the ball red", step=5, captured=pipeline.session.captured_scene())
        assert not hull.known
        pipeline.session.enter_phase(Phase.EDIT)
        assert hull.known and not bool((hull.relevance == 0.25).all())


def test_a_released_editor_leaves_no_network_in_memory(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    pipeline = build_trainer(small_config(ring_scene, editor_folder, tmp_path)).pipeline
    pipeline.release_editor()
    gc.disable()
    try:
        editor = pipeline.editor()
        editor.unet.cycle = [editor]  # like those that the first load in a process leaves
        networks = [weakref.ref(network) for network in (editor.unet, editor.vae, editor.text_encoder)]
        del editor
        assert all(network() is not None for network in networks)
        pipeline.release_editor()
        assert all(network() is None for network in networks)
    finally:
        gc.enable()
    assert pipeline.editor().encode_text("make the ball blue").ndim == 3


def test_no_hull_is_built_without_localization(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    options = {"reconstruct_steps": 0, "localization": "none"}
    trainer = build_trainer(small_config(ring_scene, editor_folder, tmp_path, **options))
    with trainer.train_lock:
        trainer.pipeline.session.enter_phase(Phase.EDIT)
    assert not trainer.pipeline.scene_model.field.relevance_hull.known


def test_a_view_with_an_empty_mask_is_not_edited(trained: WysTrainer) -> None:
    pipeline = trained.pipeline
    for number in range(200, 204):
        step(trained, number)
    pipeline.settings.update(mask_threshold=1.0)
    edited = set(pipeline.datamanager.edited_views)
    step(trained, 213)
    record = json.loads((trained.base_dir / "wys" / "edits.jsonl").read_text().splitlines()[-1])
    assert (record["step"], record["mask_fraction"], record["steps"]) == (213, 0.0, 0)
    assert pipeline.datamanager.edited_views == edited


def test_edits_do_not_depend_on_global_random_state(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    """An edit depends on the run's seed and its number only."""
    edits = []
    for run in range(2):
        options = {"reconstruct_steps": 0, "localize_steps": 1, "mask_threshold": 0.0, "seed": 5}
        trainer = build_trainer(small_config(ring_scene, editor_folder, tmp_path / str(run), **options))
        with trainer.train_lock:
            trainer.pipeline.session.enter_phase(Phase.EDIT)
        torch.rand(run * 100)
        trainer.pipeline.session.edit_loop.edit(1, trainer.base_dir / "wys")
        (view,) = trainer.pipeline.datamanager.edited_views
        edits.append((view, trainer.pipeline.datamanager.current_views([view])))
    assert edits[0][0] == edits[1][0] and torch.equal(edits[0][1], edits[1][1])


@pytest.mark.parametrize("localization", ["relevance-field", "relevance-map", "none"])
def test_partial_renders_equal_the_whole_render_in_the_mask(
    trained: WysTrainer, localization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mask and colors are those of the whole render, although only pixels near the mask are rendered."""
    pipeline = trained.pipeline
    model, data, view = pipeline.scene_model, pipeline.datamanager, 3
    monkeypatch.setattr(pipeline.config, "edit_resolution", 40)
    pipeline.settings.update(localization=localization, mask_threshold=0.5)
    render, computed = model.get_outputs, []

    def render_relevant_ball(rays: RayBundle) -> dict[str, torch.Tensor]:
        computed.append(len(rays))
        distance = torch.linalg.cross(rays.origins, rays.directions).norm(dim=-1, keepdim=True)
        return {**render(rays), "relevance": (1 - 2 * distance).clamp(0, 1)}

    monkeypatch.setattr(model, "get_outputs", render_relevant_ball)
    whole = model.render_view(data.train_dataset.cameras, view)
    expected = torch.ones(data.view_size, dtype=torch.bool)
    if localization != "none":
        expected = whole["relevance_value"][..., 0] >= 0.5
    maps = torch.zeros(data.num_views, *data.view_size, 1)
    if localization == "relevance-map":
        maps[view, ..., 0] = expected.float()
    data.set_relevance(maps[..., 0])

    computed.clear()
    start = pipeline.session.edit_loop.prepare_edit(view)
    assert torch.equal(start.mask, expected) and expected.any()
    torch.testing.assert_close(start.render[expected], whole["rgb"][expected], atol=1e-5, rtol=0)
    torch.testing.assert_close(start.relevance[expected], whole["relevance_value"][..., 0][expected], atol=1e-5, rtol=0)
    pixels, latents = expected.numel(), math.prod(pipeline.editor().latent_size(*expected.shape))
    assert sum(computed) == int(start.rendered.sum()) + latents
    assert (localization == "none") == (sum(computed) > pixels)


@pytest.mark.parametrize(("resolution", "rendered"), [(24, (16, 20)), (40, (32, 40)), (80, (32, 40))])
def test_renders_for_edits_are_at_most_the_editing_size(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, resolution: int, rendered: tuple[int, int]
) -> None:
    options = {"edit_resolution": resolution, "reconstruct_steps": 0, "localization": "relevance-map"}
    trainer = build_trainer(small_config(ring_scene, editor_folder, tmp_path, **options))
    data, sizes = trainer.pipeline.datamanager, []
    edit_views = data.edit_views

    def watched(editor: Editor, inputs: list[EditInput], *arguments, **named) -> torch.Tensor:
        sizes.extend(tuple(edit_input.render.shape[:2]) for edit_input in inputs)
        return edit_views(editor, inputs, *arguments, **named)

    data.edit_views = watched
    with trainer.train_lock:
        trainer.pipeline.session.enter_phase(Phase.LOCALIZE)
        trainer.pipeline.session.enter_phase(Phase.EDIT)
    trainer.pipeline.session.edit_loop.edit(1, trainer.base_dir / "wys")
    (view,) = data.edited_views
    assert sizes == [rendered] and data.view_size == (32, 40)
    mask = read_png(trainer.base_dir / "wys" / "masks" / f"{data.view_names[view]}.png")[..., 0] > 0
    assert mask.any() and mask.shape == data.view_size
    assert torch.equal(data.current_views([view])[0][~mask], data.captured_views([view])[0][~mask])


def test_the_viewer_renders_while_relevance_maps_are_made(
    ring_scene: Path, editor_folder: Path, tmp_path: Path
) -> None:
    options = {"relevance_batch_size": 1, "reconstruct_steps": 0}
    trainer = build_trainer(small_config(ring_scene, editor_folder, tmp_path, **options))
    maps, renders = [], []

    def render() -> None:
        with trainer.train_lock:
            renders.append(len(maps))

    viewer = threading.Thread(target=render)

    def report(text: str) -> None:
        maps.append(text)
        if len(maps) == 1:
            viewer.start()
            viewer.join(timeout=60)

    trainer.pipeline.report = report
    trainer._train_step(0)
    assert renders == [1] and len(maps) == trainer.pipeline.datamanager.num_views


def test_maps_of_another_precision_are_not_reused(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(small_config(ring_scene, editor_folder, tmp_path, reconstruct_steps=0))
    pipeline, made = trainer.pipeline, []
    pipeline.report = made.append
    for dtype, computed in (("auto", True), ("float32", False), ("bfloat16", True), ("bfloat16", False)):
        pipeline.config.editor_dtype = dtype
        pipeline.release_editor()
        made.clear()
        pipeline._make_relevance_maps(tmp_path)
        assert bool(made) is computed, dtype


def test_the_first_edit_steps_keep_the_scene(ring_scene: Path, editor_folder: Path, tmp_path: Path) -> None:
    """With the small second moments of the reconstruction, Adam's first steps on an absolute error would be too large."""
    options = {"reconstruct_steps": 150, "localize_steps": 1, "mask_threshold": 1.0}
    trainer = build_trainer(small_config(ring_scene, editor_folder, tmp_path, **options))
    for number in range(151):
        step(trainer, number)
    data, model = trainer.pipeline.datamanager, trainer.pipeline.scene_model

    def similarity() -> float:
        return psnr(model.render_view(data.train_dataset.cameras, 0)["rgb"], data.captured_views([0])[0])

    before = similarity()
    assert trainer.optimizers.optimizers["fields"].state, "reconstruction has filled the optimizer"
    for number in range(151, 171):
        step(trainer, number)
        assert similarity() > before - 1.5


@pytest.mark.parametrize("background", ["random", "last_sample", "black", "white"])
def test_edits_see_the_background_of_nerfactos_metrics(background, editor_folder: Path, tmp_path: Path) -> None:
    config = small_config(write_ring_scene(tmp_path / "scene", alpha=True, views=4), editor_folder, tmp_path)
    config.pipeline.model.background_color = background
    pipeline = config.pipeline.setup(device="cpu", test_mode="test")
    data = pipeline.datamanager
    expected = pipeline.scene_model.renderer_rgb.blend_background(data.train_dataset.get_data(1)["image"])
    torch.testing.assert_close(data.reference_views([1])[0], expected, atol=1 / 510 + 1e-6, rtol=0)
    assert torch.equal(data.captured_views([1]), data.reference_views([1]))


def test_transparent_pixels_are_reconstructed_as_empty_space(editor_folder: Path, tmp_path: Path) -> None:
    """If views are blended with random colors, nothing opaque explains transparent pixels."""
    scene = write_ring_scene(tmp_path / "scene", alpha=True)
    config = small_config(scene, editor_folder, tmp_path, reconstruct_steps=80)
    config.pipeline.model.background_color = "random"
    trainer = build_trainer(config)
    for number in range(80):
        step(trainer, number)
    data, model = trainer.pipeline.datamanager, trainer.pipeline.scene_model
    for view in (3, 8):
        accumulation = model.render_view(data.cameras, view)["accumulation"]
        opaque = data.train_dataset.get_data(view)["image"][..., 3:] == 1
        assert float(accumulation[opaque].mean()) > 0.7 and float(accumulation[~opaque].mean()) < 0.3
