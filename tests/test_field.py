"""The dual-head field: density and radiance of nerfacto, and a relevance head whose gradients stay in the head."""

import pytest
import torch
from conftest import SMALL_FIELD
from nerfstudio.cameras.rays import Frustums, RaySamples
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.field_components.spatial_distortions import SceneContraction
from nerfstudio.fields.nerfacto_field import NerfactoField

from wys_nerfstudio.field import WysField

SIZES = {
    **SMALL_FIELD,
    "appearance_embedding_dim": 4,
    "use_average_appearance_embedding": True,
}
AABB = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
VIEWS = 5
INPUTS = pytest.mark.parametrize("relevance_input", ["geometry", "geometry+position", "hashgrid"])
RELEVANCE_KEYS = ("mlp_relevance.", "relevance_encoding.", "relevance_hull.")


def build(cls: type = WysField, **changes):
    torch.manual_seed(0)
    field = cls(AABB, num_images=VIEWS, spatial_distortion=SceneContraction(order=float("inf")), **{**SIZES, **changes})
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            if "hash_table" in name:
                parameter.mul_(1000)  # initial values are nearly constant over space
    return field


def samples(rays: int = 6, count: int = 4, view: int | None = None) -> RaySamples:
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(rays, 1, 3, generator=generator), dim=-1)
    starts = torch.linspace(0.1, 2, count)[None, :, None].expand(rays, -1, -1)
    views = (
        torch.randint(0, VIEWS, (rays, 1, 1), generator=generator) if view is None else torch.full((rays, 1, 1), view)
    )
    frustums = Frustums(
        origins=0.3 * torch.randn(rays, 1, 3, generator=generator).expand(-1, count, -1),
        directions=directions.expand(-1, count, -1),
        starts=starts,
        ends=starts + 0.2,
        pixel_area=torch.ones(rays, count, 1),
    )
    return RaySamples(frustums=frustums, camera_indices=views.expand(-1, count, -1))


def nerfacto_of(field: WysField) -> NerfactoField:
    """Return nerfacto's field with the weights of `field`."""
    nerfacto = build(NerfactoField)
    state = {key: value for key, value in field.state_dict().items() if not key.startswith(RELEVANCE_KEYS)}
    nerfacto.load_state_dict(state, strict=True)
    return nerfacto


def rgb_of(field: NerfactoField, rays: RaySamples) -> torch.Tensor:
    _, features = field.get_density(rays)
    return field.get_outputs(rays, features)[FieldHeadNames.RGB]


@INPUTS
def test_nerfactos_weights_lack_only_the_relevance_head(relevance_input):
    field = build(relevance_input=relevance_input)
    missing, unexpected = field.load_state_dict(build(NerfactoField).state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all(key.startswith(RELEVANCE_KEYS) for key in missing)


@INPUTS
@pytest.mark.parametrize("training", [True, False])
def test_density_and_radiance_equal_nerfactos_bit_for_bit(relevance_input, training):
    field = build(relevance_input=relevance_input).train(training)
    nerfacto = nerfacto_of(field).train(training)
    rays = samples()
    density, features = field.get_density(rays)
    nerfacto_density, nerfacto_features = nerfacto.get_density(rays)
    assert torch.equal(density, nerfacto_density)
    assert torch.equal(features, nerfacto_features)
    rgb = field.get_outputs(rays, features)[FieldHeadNames.RGB]
    assert torch.equal(rgb, nerfacto.get_outputs(rays, nerfacto_features)[FieldHeadNames.RGB])
    assert float(rgb.detach().std()) > 1e-3


def test_gradients_of_ray_origins_and_hash_table_equal_nerfactos():
    field = build()
    gradients = []
    for model in (field, nerfacto_of(field)):
        rays = samples()
        rays.frustums.origins = rays.frustums.origins.clone().requires_grad_()
        density, features = model.get_density(rays)
        (density.sum() + features.square().sum()).backward()
        gradients.append((rays.frustums.origins.grad, model.mlp_base.model[0].hash_table.grad))
    for wys, nerfacto in zip(*gradients):
        torch.testing.assert_close(wys, nerfacto, rtol=1e-4, atol=1e-6)
        assert wys.any()


@pytest.mark.parametrize("bounded", [False, True])
def test_to_world_inverts_to_unit_cube(bounded):
    field = build()
    if bounded:
        field.spatial_distortion, field.aabb = None, torch.nn.Parameter(torch.tensor([[-1.0, 0, -2], [3, 1, 2]]))
    positions = 0.01 + 0.98 * torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    positions[0] = 0.5
    world = field.to_world(positions)
    torch.testing.assert_close(field.to_unit_cube(world), positions, atol=1e-5, rtol=0)
    assert float(world.detach().abs().max()) > (2.5 if bounded else 10)


def test_density_of_a_bounded_scene_equals_nerfactos():
    field, nerfacto = build(), build(NerfactoField)
    field.load_state_dict(nerfacto.state_dict(), strict=False)
    for model in (field, nerfacto):
        model.spatial_distortion = None
    for wys, expected in zip(field.get_density(samples()), nerfacto.get_density(samples())):
        assert torch.equal(wys, expected)


def test_colors_without_appearance_embedding_equal_nerfactos():
    field, nerfacto = build(appearance_embedding_dim=0), build(NerfactoField, appearance_embedding_dim=0)
    field.load_state_dict(nerfacto.state_dict(), strict=False)
    assert torch.equal(rgb_of(field, samples()), rgb_of(nerfacto, samples()))


def test_colors_of_zero_appearance_equal_nerfactos():
    field = build(use_average_appearance_embedding=False).eval()
    nerfacto = build(NerfactoField, use_average_appearance_embedding=False).eval()
    field.load_state_dict(nerfacto.state_dict(), strict=False)
    assert torch.equal(rgb_of(field, samples()), rgb_of(nerfacto, samples()))


def test_one_ray_and_one_sample_keep_their_shapes():
    field = build()
    assert rgb_of(field, samples(rays=1)).shape == (1, 4, 3)
    assert rgb_of(field, samples(rays=3, count=1)).shape == (3, 1, 3)


def test_appearance_index_selects_the_appearance_of_that_view():
    field = build()
    trained = rgb_of(field, samples(view=3))
    field.eval()
    average = rgb_of(field, samples(view=3))
    field.appearance_index = 3
    torch.testing.assert_close(rgb_of(field, samples(view=0)), trained)
    assert not torch.allclose(average, trained, atol=1e-4)
    field.appearance_index = None
    assert torch.equal(rgb_of(field, samples(view=3)), average)


@INPUTS
def test_relevance_has_the_samples_shape_and_unit_range(relevance_input):
    field = build(relevance_input=relevance_input)
    _, features = field.get_density(samples())
    relevance = field.get_relevance(samples(), features)
    assert relevance.shape == (6, 4, 1)
    assert 0 <= float(relevance.min()) < float(relevance.max()) <= 1


@INPUTS
def test_relevance_depends_on_position_alone(relevance_input):
    field = build(relevance_input=relevance_input)
    rays = samples()
    positions = rays.frustums.get_positions().detach()
    opposite = samples(view=0)
    opposite.frustums.directions = -opposite.frustums.directions
    middle = (opposite.frustums.starts + opposite.frustums.ends) / 2
    opposite.frustums.origins = positions - opposite.frustums.directions * middle
    torch.testing.assert_close(
        field.get_relevance(opposite, field.get_density(opposite)[1]),
        field.get_relevance(rays, field.get_density(rays)[1]),
        atol=1e-4,
        rtol=0,
    )


@INPUTS
def test_relevance_gradients_reach_the_relevance_head_alone(relevance_input):
    field = build(relevance_input=relevance_input)
    rays = samples()
    rays.frustums.origins = rays.frustums.origins.clone().requires_grad_()
    _, features = field.get_density(rays)
    field.get_relevance(rays, features).sum().backward()
    assert rays.frustums.origins.grad is None
    assert all(p.grad is not None and bool(p.grad.any()) for p in field.relevance_parameters()[-2:])
    assert all(p.grad is not None for p in field.relevance_parameters())
    assert all(p.grad is None for p in field.scene_parameters())


@INPUTS
def test_every_parameter_is_in_one_of_the_two_groups(relevance_input):
    field = build(relevance_input=relevance_input)
    scene, head = ({id(p) for p in group} for group in (field.scene_parameters(), field.relevance_parameters()))
    assert not scene & head
    assert scene | head == {id(p) for p in field.parameters()}


def test_scene_parameters_have_nerfactos_order():
    # Adam's saved state is indexed by position: another order would mix up the moments of a resumed run.
    assert [p.shape for p in build().scene_parameters()] == [p.shape for p in build(NerfactoField).parameters()]
