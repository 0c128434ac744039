"""The model: whose gradient reaches what in which phase, the extra outputs, and nerfacto's losses."""

import matplotlib
import pytest
import torch
from conftest import SMALL_FIELD
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.renderers import RGBRenderer
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig

from wys_nerfstudio.model import WysModel, WysModelConfig
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
    _roughen(model)
    model.phase = phase
    return model


def _roughen(model: torch.nn.Module) -> None:
    """Out of the flat start, so that places differ; poses off their start, so that they matter."""
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


def touched(model: WysModel) -> set[str]:
    """The parts of the model that a gradient has reached."""
    return {
        name.split(".")[0] if not name.startswith("field.") else ".".join(name.split(".")[:2])
        for name, p in model.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }


# ---------------------------------------------------------------------------------------------------------------- gradients


@INPUTS
@pytest.mark.parametrize("phase", [Phase.LOCALIZE, Phase.EDIT])
@pytest.mark.parametrize("poses", ["off", "SO3xR3"])
def test_the_relevance_loss_trains_the_relevance_head_and_nothing_else(relevance_input, phase, poses):
    model = build(phase, relevance_input=relevance_input, camera_optimizer=CameraOptimizerConfig(mode=poses)).train()
    losses_of(model, batch())["relevance_loss"].backward()
    assert touched(model) == {"field.mlp_relevance"}
    head = {id(p) for p in model.field.relevance_parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in head)


@INPUTS
def test_a_step_of_localisation_leaves_every_weight_of_the_scene_bit_for_bit(relevance_input):
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
def test_edited_views_train_the_scene_but_no_camera(relevance_input):
    model = build(relevance_input=relevance_input, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3")).train()
    losses = losses_of(model, batch())
    (losses["rgb_loss"] + losses["interlevel_loss"] + losses["distortion_loss"]).backward()
    assert touched(model) == {"field.embedding_appearance", "field.mlp_base", "field.mlp_head", "proposal_networks"}


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
    assert touched(model) == scene | {"camera_optimizer"}


# ------------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("poses", ["off", "SO3xR3"])
def test_reconstruction_losses_and_metrics_are_nerfactos(poses, alexnet_file, tmp_path, monkeypatch):
    from torchvision.models import alexnet

    # Nerfacto builds its LPIPS from torch's cache.
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(alexnet(weights=None).state_dict(), cache / "alexnet-owt-7be5be79.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    optimizer = CameraOptimizerConfig(mode=poses)
    ours = build(Phase.RECONSTRUCT, camera_optimizer=optimizer).train()
    theirs = NerfactoModelConfig(**SIZES, camera_optimizer=optimizer).setup(
        scene_box=SCENE_BOX, num_train_data=VIEWS, metadata={}
    )
    missing, _ = theirs.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if not k.startswith(("field.mlp_rel", "field.relevance"))},
        strict=False,
    )
    assert all(key.startswith("lpips.") for key in missing)

    def everything(model: NerfactoModel) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        outputs = model(rays())
        metrics = model.get_metrics_dict(outputs, batch())
        losses = model.get_loss_dict(outputs, batch(), metrics)
        return {
            **{f"loss {k}": v for k, v in losses.items()},
            **{f"metric {k}": torch.as_tensor(v) for k, v in metrics.items()},
        }

    result, wanted = everything(ours), everything(theirs.train())
    assert result.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(result[name], wanted[name], rtol=1e-6, atol=1e-8)


def weighted_squares(pairs: list[tuple[float, float]], agreement: float) -> float:
    """Sum of the squared differences of rendered and wanted relevance; what is rendered too high weighs more."""
    return sum(2 * (agreement if a > b else 1 - agreement) * (a - b) ** 2 for a, b in pairs)


@pytest.mark.parametrize("agreement", [0.5, 0.9])
def test_localisation_has_the_disagreement_with_the_maps_as_its_only_loss(agreement):
    model = build(Phase.LOCALIZE, relevance_loss_mult=3.0, relevance_expectile=agreement).train()
    data = batch()
    torch.manual_seed(1)
    outputs = model(rays())
    assert set(outputs) == {"relevance"}
    assert model.get_metrics_dict(outputs, data) == {}
    losses = model.get_loss_dict(outputs, data, {})
    pairs = list(zip(outputs["relevance"].flatten().tolist(), data["relevance"].flatten().tolist()))
    assert len({a > b for a, b in pairs}) == 2
    assert set(losses) == {"relevance_loss"}
    assert float(losses["relevance_loss"]) == pytest.approx(3 * weighted_squares(pairs, agreement) / 32, rel=1e-5)


def test_edited_views_are_compared_by_their_absolute_difference():
    model, data = build().train(), batch()
    outputs = model(rays())
    losses = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))
    pairs = zip(outputs["rgb"].flatten().tolist(), data["image"].flatten().tolist())
    assert float(losses["rgb_loss"]) == pytest.approx(sum(abs(a - b) for a, b in pairs) / 96, rel=1e-5)
    assert set(losses) == {"relevance_loss", "rgb_loss", "interlevel_loss", "distortion_loss"}


def test_while_views_are_edited_some_rays_train_the_relevance_head_as_all_do_in_localisation():
    model, data = build(relevance_loss_mult=3.0, relevance_expectile=0.9).train(), batch()
    torch.manual_seed(1)
    outputs = model(rays())
    model.phase = Phase.LOCALIZE
    torch.manual_seed(1)
    everywhere = model(rays())["relevance"]
    assert len(everywhere) == 32
    torch.testing.assert_close(outputs["relevance"], everywhere[::4])
    model.phase = Phase.EDIT
    loss = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))["relevance_loss"]
    pairs = list(zip(everywhere.flatten().tolist(), data["relevance"].flatten().tolist()))[::4]
    assert float(loss) == pytest.approx(3 * weighted_squares(pairs, 0.9) / 8, rel=1e-5)


def test_edited_views_without_relevance_maps_have_no_relevance_loss():
    assert "relevance_loss" not in losses_of(build().train(), {"image": batch()["image"]})


def test_the_perceptual_loss_sees_the_batch_as_patches(alexnet_file):
    from wys_nerfstudio.evaluation.lpips import Lpips

    model = build(lpips_loss_mult=2.0, lpips_weights=alexnet_file).train()
    data = {**batch(2 * 32 * 32), "patch_size": 32}
    outputs = model(rays(2 * 32 * 32))
    losses = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))
    patches = [x.detach().reshape(2, 32, 32, 3).permute(0, 3, 1, 2) for x in (outputs["rgb"], data["image"])]
    assert float(losses["lpips_loss"]) == pytest.approx(2 * float(Lpips(alexnet_file)(*patches)), rel=1e-4)
    losses["lpips_loss"].backward()
    assert "field.mlp_head" in touched(model)


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
def test_eval_outputs_have_the_localisation_in_every_phase(phase):
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
        wanted = (relevance >= threshold).float().expand(-1, -1, 3)
        assert torch.equal(model.render_view(cameras(), 0)["edit_mask"], wanted)


def test_without_localisation_everything_is_to_be_edited():
    model = build()
    model.localized, model.mask_threshold = False, 0.9
    outputs = model.render_view(cameras(), 0)
    assert bool((outputs["edit_mask"] == 1).all())
    assert bool((outputs["relevance_value"] == 1).all())


def test_in_eval_mode_rays_are_as_relevant_as_the_surface_or_the_air_before_it():
    model, bundle = build().eval(), rays()
    with torch.no_grad():
        surface = model(bundle)["relevance"]
        model.field.relevance_hull.relevance.copy_(torch.rand(model.field.relevance_hull.relevance.shape) ** 40)
        seen = model(bundle)["relevance"]
        samples, weights, _ = model.proposal_sampler(bundle, density_fns=model.density_fns)
        weights = samples.get_weights(model.field.get_density(samples)[0])
        air = model.field.free_space_relevance(samples, weights)
    assert torch.equal(seen, torch.maximum(surface, air))
    assert (air > surface).any() and (air < surface).any()
    model.localized = False
    assert model(bundle)["relevance"].eq(1).all()


@pytest.mark.parametrize("background", ["last_sample", "black", "white", "random"])
@pytest.mark.parametrize("mode", ["localize", "edit", "eval"])
def test_relevance_has_the_background_that_colours_have(background, mode, monkeypatch):
    """Nerfacto shows plain ground as the colour of a ray's last sample, with hardly any density; relevance must follow."""
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
    wanted = RGBRenderer(shown).eval()(value.expand(-1, -1, 3), weight)[:, :1].detach()
    torch.testing.assert_close(relevance, wanted, atol=1e-6, rtol=0)
    assert float(weight.sum(dim=1).min()) < 0.9  # there is a background to be seen


@pytest.mark.parametrize("phase", [Phase.LOCALIZE, Phase.EDIT])
def test_what_the_relevance_head_is_trained_on_knows_nothing_of_the_air(phase):
    seen = []
    for value in (-1.0, 1.0):
        model = build(phase).train()
        model.field.relevance_hull.relevance.fill_(value)
        torch.manual_seed(1)
        seen.append(model(rays())["relevance"])
    assert torch.equal(*seen)


def test_relevance_has_colours_of_a_fixed_scale():
    """Equal numbers have equal colours, whatever else is in the picture."""
    model = build()
    outputs = model.render_view(cameras(), 0)
    for value, colour in zip(outputs["relevance_value"].flatten().tolist(), outputs["relevance"].flatten(0, 1)):
        wanted = matplotlib.colormaps["inferno"].colors[int(value * 255)]
        assert colour.tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_overlay_draws_the_masks_border_and_tints_what_is_within():
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
            wanted = 0.5 * (outputs["rgb"][y, x] + outputs["relevance"][y, x]) if around.all() else torch.ones(3)
            torch.testing.assert_close(outputs["relevance_overlay"][y, x], wanted)
    assert 0 < inner < int(mask.sum())


def test_the_overlay_darkens_what_stays():
    model = build()
    model.mask_threshold = float(model.render_view(cameras(), 0)["relevance_value"].median())
    outputs = model.render_view(cameras(), 0)
    outside = outputs["edit_mask"][..., 0] == 0
    assert bool(outside.any())
    torch.testing.assert_close(outputs["relevance_overlay"][outside], 0.4 * outputs["rgb"][outside])


@pytest.mark.parametrize("training", [True, False])
def test_rendering_a_view_puts_the_mode_back(training):
    model = build().train(training)
    model.render_view(cameras(), 2)
    assert model.training is training
    assert all(module.training is training for module in (model.field, model.proposal_sampler))
    assert model.field.appearance_index is None


def test_the_mode_is_put_back_after_an_error_too():
    model = build().train()
    with pytest.raises(RuntimeError, match="on purpose"), model.eval_as_view(1):
        assert not model.training
        assert model.field.appearance_index == 1
        raise RuntimeError("on purpose")
    assert model.training
    assert model.field.appearance_index is None


def test_a_view_is_rendered_with_its_own_appearance_and_no_jitter():
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
def test_no_ray_begins_before_the_near_plane(training, monkeypatch):
    """What lies nearer is trained by no ray of this camera, and would be drawn as clouds."""
    model, seen = build(near_plane=0.3).train(training), []
    render = model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda bundle: (seen.append(bundle.nears), render(bundle))[1])
    model(rays())
    assert torch.equal(seen[0], torch.full_like(seen[0], 0.3))


def _with_index(camera: Cameras, view: int) -> Cameras:
    camera.metadata = {"cam_idx": view}
    return camera


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_some_pixels_of_a_view_are_those_of_its_render(share):
    model = build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    where = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) < share
    where[0, 0] |= 0 < share < 0.1  # at least a single one
    whole = model.render_view(cameras(), 1)
    rgb, relevance, depth = model.render_pixels(cameras(), 1, where)
    assert rgb.shape == (int(where.sum()), 3) and relevance.shape == depth.shape == (int(where.sum()),)
    torch.testing.assert_close(rgb, whole["rgb"][where], atol=1e-6, rtol=0)
    torch.testing.assert_close(relevance, whole["relevance_value"][where][:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(depth, whole["depth"][where][:, 0], atol=1e-6, rtol=0)


def test_only_the_wanted_pixels_are_computed(monkeypatch):
    model, computed = build(), []
    render = model.get_outputs
    monkeypatch.setattr(model, "get_outputs", lambda bundle: (computed.append(len(bundle)), render(bundle))[1])
    where = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    where[3:7, 2:5] = True
    model.render_pixels(cameras(), 0, where)
    assert computed == [12]


def test_pixels_of_a_coarser_picture_are_those_at_the_middle_of_its_own():
    model = build()
    (fine, relevance, _), (coarse, coarse_relevance, _) = (
        model.render_pixels(cameras(), 1, torch.ones(size, dtype=torch.bool))
        for size in ((HEIGHT * 3, WIDTH * 5), (HEIGHT, WIDTH))
    )
    middle = torch.zeros(HEIGHT * 3, WIDTH * 5, dtype=torch.bool)
    middle[1::3, 2::5] = True
    torch.testing.assert_close(coarse, fine[middle.flatten()], atol=1e-5, rtol=0)
    torch.testing.assert_close(coarse_relevance, relevance[middle.flatten()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["whole", "pixels"])
def test_rendering_leaves_the_cameras_as_they_are(kind):
    given, model = cameras(), build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    before = given.camera_to_worlds.clone()
    if kind == "whole":
        model.render_view(given, 2)
    else:
        model.render_pixels(given, 2, torch.ones(HEIGHT // 2, WIDTH // 2, dtype=torch.bool))
    assert torch.equal(given.camera_to_worlds, before)
    assert int(given.width[2]) == WIDTH and float(given.fx[2]) == 20
    assert given.metadata is None


def test_image_metrics_have_lpips_where_its_weights_are_at_hand(alexnet_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    truth = {"image": torch.rand(64, 64, 3)}
    for weights, wanted in ((None, {"psnr", "ssim"}), (alexnet_file, {"psnr", "ssim", "lpips"})):
        model = build(lpips_weights=weights)
        outputs = {"rgb": torch.rand(64, 64, 3), "depth": torch.rand(64, 64, 1), "accumulation": torch.rand(64, 64, 1)}
        outputs |= {"relevance": torch.rand(64, 64, 3), "relevance_overlay": torch.rand(64, 64, 3)}
        metrics, images = model.get_image_metrics_and_images(outputs, truth)
        assert set(metrics) == wanted
        squared = (outputs["rgb"] - truth["image"]) ** 2
        assert metrics["psnr"] == pytest.approx(-10 * float(squared.mean().log10()), rel=1e-4)
        assert set(images) >= {"img", "depth", "relevance", "relevance_overlay"}


# ---------------------------------------------------------------------------------------------------------------- proposals


def run_callbacks(model: WysModel, step: int) -> None:
    callbacks = model.get_training_callbacks(TrainingCallbackAttributes(None, None, None, None))
    for place in (TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN_ITERATION):
        for callback in callbacks:
            callback.run_callback_at_location(step, place)


def test_trained_proposal_networks_start_past_their_warm_up():
    fresh, trained = build(), build()
    trained.proposals_pretrained = True
    for model in (fresh, trained):
        run_callbacks(model, 0)
    assert fresh.proposal_sampler._anneal == 0
    assert trained.proposal_sampler._anneal == 1
    assert fresh.proposal_sampler.update_sched(fresh.proposal_sampler._step) == 1
    assert trained.proposal_sampler.update_sched(trained.proposal_sampler._step) == trained.config.proposal_update_every


@pytest.mark.parametrize("step", [0, 1, 777, 2500, 5000, 90000])
def test_proposal_networks_are_updated_as_often_as_nerfactos(step):
    import numpy as np

    config = build().config
    nerfactos = np.interp(step, [0, config.proposal_warmup], [0, config.proposal_update_every])
    wanted = float(np.clip(nerfactos, 1, config.proposal_update_every))
    assert build().proposal_sampler.update_sched(step) == pytest.approx(wanted)


def test_a_proposal_network_can_be_shared():
    first = SIZES["proposal_net_args_list"][:1]
    model = build(use_same_proposal_network=True, proposal_net_args_list=first)
    assert len(model.proposal_networks) == 1
    assert len(model.density_fns) == 2
    assert bool(torch.isfinite(model.render_view(cameras(), 0)["rgb"]).all())


def test_the_uniform_sampler_is_used_if_it_is_asked_for():
    from nerfstudio.model_components.ray_samplers import UniformSampler

    assert isinstance(build(proposal_initial_sampler="uniform").proposal_sampler.initial_sampler, UniformSampler)
    assert not isinstance(build().proposal_sampler.initial_sampler, UniformSampler)
