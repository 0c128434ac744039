"""The model: gradients in each phase, losses, outputs of rendered views, proposal networks."""

import copy

import matplotlib
import pytest
import torch
from conftest import SMALL_FIELD
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.renderers import RGBRenderer
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from profiled import peak_bytes

from wys_nerfstudio.model import RAYS_PER_CHUNK, WysModel, WysModelConfig
from wys_nerfstudio.training.schedule import Phase

VIEWS = 4
HEIGHT, WIDTH = 12, 16
SIZES = {
    **SMALL_FIELD,
    "appearance_embed_dim": 4,
    "num_proposal_samples_per_ray": (12, 8),
    "num_nerf_samples_per_ray": 6,
    "proposal_net_args_list": [
        {"hidden_dim": 8, "log2_hashmap_size": 8, "num_levels": 2, "max_res": 16, "use_linear": False},
        {"hidden_dim": 8, "log2_hashmap_size": 8, "num_levels": 2, "max_res": 32, "use_linear": False},
    ],
    "background_color": "black",
}
INPUTS = pytest.mark.parametrize("relevance_input", ["geometry", "geometry+position", "hashgrid"])
SCENE_BOX = SceneBox(aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]))


def build(phase: Phase = Phase.EDIT, **changes) -> WysModel:
    torch.manual_seed(0)
    model = WysModelConfig(**{**SIZES, "lpips_loss_mult": 0.0, **changes}).setup(
        scene_box=SCENE_BOX, num_train_data=VIEWS, metadata={}
    )
    _randomize(model)
    model.phase = phase
    return model


def _randomize(model: torch.nn.Module) -> None:
    """Scale the hash tables, whose initial values are nearly constant over space, and perturb the poses."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hash_table" in name:
                parameter.mul_(1000)
            if "pose_adjustment" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


def cameras() -> Cameras:
    poses = torch.eye(4)[None, :3].repeat(VIEWS, 1, 1)
    poses[:, 2, 3] = torch.linspace(0.5, 1.5, VIEWS)
    return Cameras(poses, 20.0, 20.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT, camera_type=CameraType.PERSPECTIVE)


def rays(count: int = 32) -> RayBundle:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.rand(count, 2, generator=generator) * torch.tensor([HEIGHT, WIDTH])
    views = torch.randint(0, VIEWS, (count, 1), generator=generator)
    return cameras().generate_rays(camera_indices=views, coords=pixels)


def batch(count: int = 32) -> dict:
    generator = torch.Generator().manual_seed(6)
    image, relevance = torch.rand(count, 3, generator=generator), torch.rand(count, 1, generator=generator)
    return {"image": image, "relevance": relevance}


def losses_of(model: NerfactoModel, data: dict) -> dict[str, torch.Tensor]:
    outputs = model(rays(len(data["image"])))
    return model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))


def parts_with_gradient(model: WysModel) -> set[str]:
    """Return the parts of the model with a nonzero gradient."""
    return {
        name.split(".")[0] if not name.startswith("field.") else ".".join(name.split(".")[:2])
        for name, p in model.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }


# ---------------------------------------------------------------------------------------------------------------- gradients


@INPUTS
@pytest.mark.parametrize("phase", [Phase.LOCALIZE, Phase.EDIT])
@pytest.mark.parametrize("poses", ["off", "SO3xR3"])
def test_the_relevance_loss_trains_the_relevance_head_alone(relevance_input, phase, poses):
    model = build(phase, relevance_input=relevance_input, camera_optimizer=CameraOptimizerConfig(mode=poses)).train()
    losses_of(model, batch())["relevance_loss"].backward()
    assert parts_with_gradient(model) == {"field.mlp_relevance"}
    head = {id(p) for p in model.field.relevance_parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in head)


@INPUTS
def test_localize_steps_change_no_weight_of_the_scene(relevance_input):
    model = build(Phase.LOCALIZE, relevance_input=relevance_input).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        sum(losses_of(model, batch()).values()).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("field.mlp_relevance.") for key in changed)


@INPUTS
def test_edit_steps_train_the_scene_but_no_camera(relevance_input):
    model = build(relevance_input=relevance_input, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3")).train()
    losses = losses_of(model, batch())
    (losses["rgb_loss"] + losses["interlevel_loss"] + losses["distortion_loss"]).backward()
    assert parts_with_gradient(model) == {
        "field.embedding_appearance",
        "field.mlp_base",
        "field.mlp_head",
        "proposal_networks",
    }


def test_the_relevance_loss_changes_no_gradient_of_the_scene():
    def gradients(data: dict) -> dict[str, torch.Tensor]:
        model = build().train()
        torch.manual_seed(1)
        sum(losses_of(model, data).values()).backward()
        named = model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None and "relevance" not in name}

    with_relevance, without = gradients(batch()), gradients({"image": batch()["image"]})
    assert with_relevance.keys() == without.keys()
    assert all(torch.equal(with_relevance[name], without[name]) for name in without)


def test_reconstruction_trains_the_scene_and_the_cameras():
    model = build(Phase.RECONSTRUCT, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3")).train()
    sum(losses_of(model, batch()).values()).backward()
    scene = {"field.embedding_appearance", "field.mlp_base", "field.mlp_head", "proposal_networks"}
    assert parts_with_gradient(model) == scene | {"camera_optimizer"}


# ------------------------------------------------------------------------------------------------------------------- losses


BACKGROUNDS = pytest.mark.parametrize("background", ["random", "last_sample", "black", "white"])


@BACKGROUNDS
@pytest.mark.parametrize("transparent", [False, True])
def test_reconstruction_losses_and_metrics_equal_nerfactos(background, transparent, torch_home):
    options = {"camera_optimizer": CameraOptimizerConfig(mode="SO3xR3"), "background_color": background}
    wys = build(Phase.RECONSTRUCT, **options)
    nerfacto = NerfactoModelConfig(**{**SIZES, **options}).setup(scene_box=SCENE_BOX, num_train_data=VIEWS, metadata={})
    nerfacto.collider = wys.collider  # nerfacto renders from 0 in eval mode
    missing, _ = nerfacto.load_state_dict(
        {k: v for k, v in wys.state_dict().items() if not k.startswith(("field.mlp_rel", "field.relevance"))},
        strict=False,
    )
    assert all(key.startswith("lpips.") for key in missing)
    data = batch()
    if transparent:
        data["image"] = torch.cat([data["image"], torch.linspace(0, 1, 32)[:, None]], dim=1)

    def outputs_of(model: NerfactoModel) -> dict:
        torch.manual_seed(1)
        return model(rays())

    def losses_and_metrics(model: NerfactoModel, outputs: dict) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        metrics = model.get_metrics_dict(outputs, data)
        losses = model.get_loss_dict(outputs, data, metrics)
        return {
            **{f"loss {k}": v for k, v in losses.items()},
            **{f"metric {k}": torch.as_tensor(v) for k, v in metrics.items()},
        }

    for training in (True, False):
        wys.train(training), nerfacto.train(training)
        outputs = outputs_of(wys)
        result, expected = losses_and_metrics(wys, outputs), losses_and_metrics(nerfacto, outputs_of(nerfacto))
        exact = losses_and_metrics(nerfacto, outputs)
        assert result.keys() == expected.keys()
        for name in expected:
            assert torch.equal(result[name], exact[name]), name
            torch.testing.assert_close(result[name], expected[name], rtol=1e-6, atol=1e-8)


@BACKGROUNDS
def test_the_edit_phase_sees_transparent_pixels_in_one_color(background):
    model, data = build(background_color=background).train(), batch()
    color, alpha = data["image"], torch.linspace(0, 1, 32)[:, None]
    outputs = model(rays())
    metrics = model.get_metrics_dict(outputs, data)
    opaque = {**data, "image": color * alpha + (background == "white") * (1 - alpha)}
    for transparent in (False, True):
        given = {**data, "image": torch.cat([color, alpha], dim=1)} if transparent else opaque
        torch.manual_seed(1)
        losses = model.get_loss_dict(outputs, given, metrics)
        torch.testing.assert_close(losses["rgb_loss"], (outputs["rgb"] - opaque["image"]).abs().mean())


def expectile_sum(pairs: list[tuple[float, float]], expectile: float) -> float:
    """Return the sum of the expectile loss over pairs of rendered and target relevance."""
    return sum(2 * (expectile if a > b else 1 - expectile) * (a - b) ** 2 for a, b in pairs)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_the_localize_phase_has_the_expectile_loss_alone(expectile):
    model = build(Phase.LOCALIZE, relevance_loss_mult=3.0, relevance_expectile=expectile).train()
    data = batch()
    torch.manual_seed(1)
    outputs = model(rays())
    assert set(outputs) == {"relevance"}
    assert model.get_metrics_dict(outputs, data) == {}
    losses = model.get_loss_dict(outputs, data, {})
    pairs = list(zip(outputs["relevance"].flatten().tolist(), data["relevance"].flatten().tolist()))
    assert len({a > b for a, b in pairs}) == 2
    assert set(losses) == {"relevance_loss"}
    assert float(losses["relevance_loss"]) == pytest.approx(3 * expectile_sum(pairs, expectile) / 32, rel=1e-5)


def test_the_edit_phase_has_an_absolute_color_loss():
    model, data = build().train(), batch()
    outputs = model(rays())
    losses = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))
    pairs = zip(outputs["rgb"].flatten().tolist(), data["image"].flatten().tolist())
    assert float(losses["rgb_loss"]) == pytest.approx(sum(abs(a - b) for a, b in pairs) / 96, rel=1e-5)
    assert set(losses) == {"relevance_loss", "rgb_loss", "interlevel_loss", "distortion_loss"}


def test_every_fourth_ray_trains_relevance_in_the_edit_phase():
    model, data = build(relevance_loss_mult=3.0, relevance_expectile=0.9).train(), batch()
    torch.manual_seed(1)
    outputs = model(rays())
    model.phase = Phase.LOCALIZE
    torch.manual_seed(1)
    relevance = model(rays())["relevance"]
    assert len(relevance) == 32
    torch.testing.assert_close(outputs["relevance"], relevance[::4])
    model.phase = Phase.EDIT
    loss = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))["relevance_loss"]
    pairs = list(zip(relevance.flatten().tolist(), data["relevance"].flatten().tolist()))[::4]
    assert float(loss) == pytest.approx(3 * expectile_sum(pairs, 0.9) / 8, rel=1e-5)


def test_no_relevance_loss_without_relevance_maps():
    assert "relevance_loss" not in losses_of(build().train(), {"image": batch()["image"]})


def test_the_perceptual_loss_is_computed_on_patches(alexnet_file):
    from wys_nerfstudio.evaluation.lpips import Lpips

    model = build(lpips_loss_mult=2.0, lpips_weights=alexnet_file).train()
    data = {**batch(2 * 32 * 32), "patch_size": 32}
    outputs = model(rays(2 * 32 * 32))
    losses = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))
    patches = [x.detach().reshape(2, 32, 32, 3).permute(0, 3, 1, 2) for x in (outputs["rgb"], data["image"])]
    assert float(losses["lpips_loss"]) == pytest.approx(2 * float(Lpips(alexnet_file)(*patches)), rel=1e-4)
    losses["lpips_loss"].backward()
    assert "field.mlp_head" in parts_with_gradient(model)


def test_lpips_is_neither_saved_nor_trained(alexnet_file):
    model = build(lpips_weights=alexnet_file)
    names = set(model.state_dict()), {name for name, _ in model.named_parameters()}
    model.perceptual_distance()
    assert (set(model.state_dict()), {name for name, _ in model.named_parameters()}) == names
    assert not any("lpips" in name for name in names[0] | names[1])
    assert model.perceptual_distance() is model.perceptual_distance()


def test_parameter_groups_cover_every_parameter_once():
    model = build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    groups = model.get_param_groups()
    assert set(groups) == {"proposal_networks", "fields", "relevance", "camera_opt"}
    grouped = [id(p) for group in groups.values() for p in group]
    named = {
        name: id(p) for name, p in model.named_parameters() if name != "device_indicator_param"
    }  # nerfstudio's own
    assert sorted(grouped) == sorted(named.values())


# ---------------------------------------------------------------------------------------------------------- views, outputs


@pytest.mark.parametrize("phase", list(Phase))
def test_relevance_outputs_are_rendered_in_every_phase(phase):
    outputs = build(phase).render_view(cameras(), 1)
    for name in ("rgb", "relevance", "relevance_overlay", "edit_mask"):
        assert outputs[name].shape == (HEIGHT, WIDTH, 3)
    assert outputs["relevance_value"].shape == (HEIGHT, WIDTH, 1)
    for name in ("rgb", "relevance", "relevance_value", "relevance_overlay", "edit_mask"):
        assert 0 <= float(outputs[name].min()) <= float(outputs[name].max()) <= 1
    assert {*outputs["edit_mask"].unique().tolist()} <= {0.0, 1.0}


def test_the_edit_mask_follows_the_threshold():
    model = build()
    relevance = model.render_view(cameras(), 0)["relevance_value"]
    middle = float(relevance.median())
    assert float(relevance.min()) < middle < float(relevance.max())
    for threshold in (0.0, middle, 1.0):
        model.mask_threshold = threshold
        expected = (relevance >= threshold).float().expand(-1, -1, 3)
        assert torch.equal(model.render_view(cameras(), 0)["edit_mask"], expected)


def test_the_edit_mask_is_full_without_localization():
    model = build()
    model.localized, model.mask_threshold = False, 0.9
    outputs = model.render_view(cameras(), 0)
    assert bool((outputs["edit_mask"] == 1).all())
    assert bool((outputs["relevance_value"] == 1).all())


def test_eval_relevance_is_the_maximum_of_surface_and_free_space():
    model, bundle = build().eval(), rays()
    with torch.no_grad():
        surface = model(bundle)["relevance"]
        model.field.relevance_hull.relevance.copy_(torch.rand(model.field.relevance_hull.relevance.shape) ** 40)
        combined = model(bundle)["relevance"]
        samples, weights, _ = model.proposal_sampler(bundle, density_fns=model.density_fns)
        weights = samples.get_weights(model.field.get_density(samples)[0])
        free_space = model.field.free_space_relevance(samples, weights)
    assert torch.equal(combined, torch.maximum(surface, free_space))
    assert (free_space > surface).any() and (free_space < surface).any()
    model.localized = False
    assert model(bundle)["relevance"].eq(1).all()


@BACKGROUNDS
@pytest.mark.parametrize("mode", ["localize", "edit", "eval"])
def test_relevance_has_the_background_of_the_colors(background, mode, monkeypatch):
    """Nerfacto fills background with the color of a ray's last sample, almost without density; relevance must follow."""
    model = build(Phase.LOCALIZE if mode == "localize" else Phase.EDIT, background_color=background)
    model.train(mode != "eval")
    values, weights = [], []
    get_relevance, get_weights = model.field.get_relevance, RaySamples.get_weights
    monkeypatch.setattr(model.field, "get_relevance", lambda *a: values.append(get_relevance(*a)) or values[-1])
    monkeypatch.setattr(RaySamples, "get_weights", lambda *a: weights.append(get_weights(*a)) or weights[-1])
    relevance = model(rays())["relevance"].detach()
    (value,), weight = values, weights[-1]
    weight = weight[:: len(weight) // len(value)]
    shown = "last_sample" if background == "last_sample" else "black"
    expected = RGBRenderer(shown).eval()(value.expand(-1, -1, 3), weight)[:, :1].detach()
    torch.testing.assert_close(relevance, expected, atol=1e-6, rtol=0)
    assert float(weight.sum(dim=1).min()) < 0.9  # some rays see the background


@pytest.mark.parametrize("phase", [Phase.LOCALIZE, Phase.EDIT])
def test_training_ignores_free_space_relevance(phase):
    seen = []
    for value in (-1.0, 1.0):
        model = build(phase).train()
        model.field.relevance_hull.relevance.fill_(value)
        torch.manual_seed(1)
        seen.append(model(rays())["relevance"])
    assert torch.equal(*seen)


def test_the_relevance_colormap_has_a_fixed_scale():
    """Equal values have equal colors, whatever the range of the image."""
    model = build()
    outputs = model.render_view(cameras(), 0)
    for value, color in zip(outputs["relevance_value"].flatten().tolist(), outputs["relevance"].flatten(0, 1)):
        expected = matplotlib.colormaps["inferno"].colors[int(value * 255)]
        assert color.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_overlay_outlines_the_mask_and_tints_its_inside():
    model = build()
    model.mask_threshold = float(model.render_view(cameras(), 0)["relevance_value"].median())
    outputs = model.render_view(cameras(), 0)
    mask = outputs["edit_mask"][..., 0] > 0
    inner = 0
    for y in range(HEIGHT):
        for x in range(WIDTH):
            if not mask[y, x]:
                continue
            around = mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            inner += bool(around.all())
            expected = 0.5 * (outputs["rgb"][y, x] + outputs["relevance"][y, x]) if around.all() else torch.ones(3)
            torch.testing.assert_close(outputs["relevance_overlay"][y, x], expected)
    assert 0 < inner < int(mask.sum())


def test_the_overlay_darkens_pixels_outside_the_mask():
    model = build()
    model.mask_threshold = float(model.render_view(cameras(), 0)["relevance_value"].median())
    outputs = model.render_view(cameras(), 0)
    outside = outputs["edit_mask"][..., 0] == 0
    assert bool(outside.any())
    torch.testing.assert_close(outputs["relevance_overlay"][outside], 0.4 * outputs["rgb"][outside])


@pytest.mark.parametrize("training", [True, False])
def test_rendering_a_view_restores_the_mode(training):
    model = build().train(training)
    model.render_view(cameras(), 2)
    assert model.training is training
    assert all(module.training is training for module in (model.field, model.proposal_sampler))
    assert model.field.appearance_index is None


def test_the_mode_is_restored_after_an_error():
    model = build().train()
    with pytest.raises(RuntimeError, match="on purpose"), model.eval_as_view(1):
        assert not model.training
        assert model.field.appearance_index == 1
        raise RuntimeError("on purpose")
    assert model.training
    assert model.field.appearance_index is None


def test_a_view_is_rendered_with_its_appearance_and_no_jitter():
    model = build().train()
    same = cameras()
    same.camera_to_worlds = same.camera_to_worlds[:1].repeat(VIEWS, 1, 1)
    model.camera_optimizer.config.mode = "off"
    one, again, other = (model.render_view(same, view)["rgb"] for view in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-4)


def test_a_view_is_rendered_at_its_learned_pose():
    model = build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    corrected = model.render_view(cameras(), 2)["rgb"]
    moved = cameras()
    moved.camera_to_worlds = model.camera_optimizer.apply_to_camera(_with_index(cameras()[2:3], 2)).detach()
    with torch.no_grad():
        model.camera_optimizer.pose_adjustment.zero_()
        model.field.embedding_appearance.embedding.weight[0] = model.field.embedding_appearance.embedding.weight[2]
    torch.testing.assert_close(model.render_view(moved, 0)["rgb"], corrected, atol=1e-5, rtol=0)
    assert not torch.allclose(model.render_view(cameras(), 2)["rgb"], corrected, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_rays_start_at_the_near_plane(training, monkeypatch):
    """No ray of a camera trains what is nearer; it would develop floaters near the camera."""
    model, seen = build(near_plane=0.3).train(training), []
    render = model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda bundle: (seen.append(bundle.nears), render(bundle))[1])
    model(rays())
    assert torch.equal(seen[0], torch.full_like(seen[0], 0.3))


def _with_index(camera: Cameras, view: int) -> Cameras:
    camera.metadata = {"cam_idx": view}
    return camera


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_rendered_pixels_equal_those_of_the_whole_view(share):
    model = build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    where = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) < share
    where[0, 0] |= 0 < share < 0.1  # at least one pixel
    whole = model.render_view(cameras(), 1)
    rgb, relevance, depth = model.render_pixels(cameras(), 1, where)
    assert rgb.shape == (int(where.sum()), 3) and relevance.shape == depth.shape == (int(where.sum()),)
    torch.testing.assert_close(rgb, whole["rgb"][where], atol=1e-6, rtol=0)
    torch.testing.assert_close(relevance, whole["relevance_value"][where][:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(depth, whole["depth"][where][:, 0], atol=1e-6, rtol=0)


def test_a_view_can_be_rendered_smaller():
    model, size = build(), (HEIGHT // 2, WIDTH // 2)
    outputs = model.render_view(cameras(), 1, size)
    rgb, relevance, _ = model.render_pixels(cameras(), 1, torch.ones(size, dtype=torch.bool))
    assert all(image.shape[:2] == size for image in outputs.values())
    torch.testing.assert_close(outputs["rgb"].flatten(0, 1), rgb, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs["relevance_value"].flatten(), relevance, atol=1e-6, rtol=0)


def test_colors_are_rendered_without_relevance(monkeypatch):
    model, views = build(), cameras()
    expected = model.render_view(views, 1)["rgb"]
    for name in ("get_relevance", "free_space_relevance"):
        monkeypatch.setattr(model.field, name, lambda *_: pytest.fail("relevance was computed"))
    assert torch.equal(model.render_colors(views, 1), expected.clamp(0, 1))
    monkeypatch.undo()
    assert "relevance_value" in model.render_view(views, 1)


def test_only_the_requested_pixels_are_rendered(monkeypatch):
    model, computed = build(), []
    render = model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda bundle: (computed.append(len(bundle)), render(bundle))[1])
    where = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    where[3:7, 2:5] = True
    model.render_pixels(cameras(), 0, where)
    assert computed == [12]


def test_coarse_pixels_are_rendered_at_their_centers():
    model = build()
    (fine, relevance, _), (coarse, coarse_relevance, _) = (
        model.render_pixels(cameras(), 1, torch.ones(size, dtype=torch.bool))
        for size in ((HEIGHT * 3, WIDTH * 5), (HEIGHT, WIDTH))
    )
    middle = torch.zeros(HEIGHT * 3, WIDTH * 5, dtype=torch.bool)
    middle[1::3, 2::5] = True
    torch.testing.assert_close(coarse, fine[middle.flatten()], atol=1e-5, rtol=0)
    torch.testing.assert_close(coarse_relevance, relevance[middle.flatten()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["whole", "smaller", "pixels"])
def test_rendering_does_not_change_the_cameras(kind):
    views, model = cameras(), build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    before = views.camera_to_worlds.clone()
    if kind == "whole":
        model.render_view(views, 2)
    elif kind == "smaller":
        model.render_view(views, 2, (HEIGHT // 2, WIDTH // 2))
    else:
        model.render_pixels(views, 2, torch.ones(HEIGHT // 2, WIDTH // 2, dtype=torch.bool))
    assert torch.equal(views.camera_to_worlds, before)
    assert int(views.width[2]) == WIDTH and float(views.fx[2]) == 20
    assert views.metadata is None


def test_image_metrics_include_lpips_if_its_weights_exist(alexnet_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    truth = {"image": torch.rand(64, 64, 3)}
    for weights, expected in ((None, {"psnr", "ssim"}), (alexnet_file, {"psnr", "ssim", "lpips"})):
        model = build(lpips_weights=weights)
        outputs = {"rgb": torch.rand(64, 64, 3), "depth": torch.rand(64, 64, 1), "accumulation": torch.rand(64, 64, 1)}
        outputs |= {"relevance": torch.rand(64, 64, 3), "relevance_overlay": torch.rand(64, 64, 3)}
        metrics, images = model.get_image_metrics_and_images(outputs, truth)
        assert set(metrics) == expected
        squared = (outputs["rgb"] - truth["image"]) ** 2
        assert metrics["psnr"] == pytest.approx(-10 * float(squared.mean().log10()), rel=1e-4)
        assert set(images) >= {"img", "depth", "relevance", "relevance_overlay"}


# ---------------------------------------------------------------------------------------------------------------- proposals


def run_callbacks(model: WysModel, step: int) -> None:
    callbacks = model.get_training_callbacks(TrainingCallbackAttributes(None, None, None, None))
    for place in (TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN_ITERATION):
        for callback in callbacks:
            callback.run_callback_at_location(step, place)


def test_pretrained_proposal_networks_skip_the_warmup():
    fresh, trained = build(), build()
    trained.proposals_pretrained = True
    for model in (fresh, trained):
        run_callbacks(model, 0)
    assert fresh.proposal_sampler._anneal == 0
    assert trained.proposal_sampler._anneal == 1
    assert fresh.proposal_sampler.update_sched(fresh.proposal_sampler._step) == 1
    assert trained.proposal_sampler.update_sched(trained.proposal_sampler._step) == trained.config.proposal_update_every


@pytest.mark.parametrize("step", [0, 1, 777, 2500, 5000, 90000])
def test_proposal_networks_are_updated_on_nerfactos_schedule(step):
    import numpy as np

    config = build().config
    nerfactos = np.interp(step, [0, config.proposal_warmup], [0, config.proposal_update_every])
    expected = float(np.clip(nerfactos, 1, config.proposal_update_every))
    assert build().proposal_sampler.update_sched(step) == pytest.approx(expected)


def test_a_proposal_network_can_be_shared():
    first = SIZES["proposal_net_args_list"][:1]
    model = build(use_same_proposal_network=True, proposal_net_args_list=first)
    assert len(model.proposal_networks) == 1
    assert len(model.density_fns) == 2
    assert bool(torch.isfinite(model.render_view(cameras(), 0)["rgb"]).all())


def test_the_uniform_sampler_can_be_selected():
    from nerfstudio.model_components.ray_samplers import UniformSampler

    assert isinstance(build(proposal_initial_sampler="uniform").proposal_sampler.initial_sampler, UniformSampler)
    assert not isinstance(build().proposal_sampler.initial_sampler, UniformSampler)


# ------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wys", "wys-small"])
def test_rays_take_less_than_2_gb_to_render_without_tiny_cuda_nn(method):
    config = copy.deepcopy(all_methods[method].pipeline.model)
    config.implementation = "torch"
    model = config.setup(scene_box=SCENE_BOX, num_train_data=VIEWS).eval()
    assert config.eval_num_rays_per_chunk == RAYS_PER_CHUNK["torch"]
    with torch.no_grad():
        few, many = (peak_bytes(lambda count=count: model(rays(count))) for count in (512, 1024))
    assert few + (many - few) / 512 * (config.eval_num_rays_per_chunk - 512) < 2e9


@pytest.mark.slow
@pytest.mark.parametrize(("method", "limit"), [("wys", 5.2e9), ("wys-small", 1.6e9)])
def test_memory_of_a_training_step_without_tiny_cuda_nn(method, limit):
    """With the editor's 2.2 GB `wys` stays within 8 GB, and `wys-small` within 6 GB."""
    options = copy.deepcopy(all_methods[method].pipeline)
    options.model.implementation, options.model.lpips_loss_mult = "torch", 0.0
    model = options.model.setup(scene_box=SCENE_BOX, num_train_data=VIEWS).train()

    def step(count: int) -> None:
        outputs = model(rays(count))
        data = batch(count)
        losses = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))
        sum(losses.values()).backward()

    for phase, count in ((Phase.RECONSTRUCT, options.datamanager.train_num_rays_per_batch),
                         (Phase.EDIT, options.datamanager.edit_num_rays_per_batch)):  # fmt: skip
        model.phase = phase
        step(256)  # allocates the gradients
        few, many = (peak_bytes(lambda part=part: step(part)) for part in (256, 512))
        weights = 4 * sum(4 * parameter.numel() for parameter in model.parameters())  # gradients and Adam's moments
        assert weights + few + (many - few) / 256 * (count - 256) < limit, phase


@pytest.mark.parametrize(("given", "backend", "chosen"), [(0, "torch", 8192), (0, "tcnn", 32768), (100, "torch", 100)])
def test_rays_per_chunk_are_chosen_by_the_backend(given, backend, chosen):
    config = WysModelConfig(eval_num_rays_per_chunk=given, implementation=backend)
    assert config.rays_per_chunk() == chosen
