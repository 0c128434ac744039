"""The dual-head field: nerfacto's radiance, and a relevance head that nothing flows back from."""

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
                parameter.mul_(1000)  # out of the flat start, so that places differ
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


def nerfacto_with_our_weights(field: WysField) -> NerfactoField:
    theirs = build(NerfactoField)
    ours = {key: value for key, value in field.state_dict().items() if not key.startswith(RELEVANCE_KEYS)}
    theirs.load_state_dict(ours, strict=True)
    return theirs


def rgb_of(field: NerfactoField, rays: RaySamples) -> torch.Tensor:
    _, features = field.get_density(rays)
    return field.get_outputs(rays, features)[FieldHeadNames.RGB]


@INPUTS
def test_a_nerfacto_fields_weights_fit_apart_from_the_relevance_head(relevance_input):
    field = build(relevance_input=relevance_input)
    theirs = build(NerfactoField, hidden_dim=8)
    missing, unexpected = field.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all(key.startswith(RELEVANCE_KEYS) for key in missing)


@INPUTS
@pytest.mark.parametrize("training", [True, False])
def test_density_and_radiance_are_nerfactos_bit_for_bit(relevance_input, training):
    field = build(relevance_input=relevance_input).train(training)
    theirs = nerfacto_with_our_weights(field).train(training)
    rays = samples()
    density, features = field.get_density(rays)
    their_density, their_features = theirs.get_density(rays)
    assert torch.equal(density, their_density)
    assert torch.equal(features, their_features)
    result = field.get_outputs(rays, features)[FieldHeadNames.RGB]
    assert torch.equal(result, theirs.get_outputs(rays, their_features)[FieldHeadNames.RGB])
    assert float(result.detach().std()) > 1e-3


def test_gradients_are_nerfactos_and_places_get_one_only_if_rays_are_to_move():
    field = build()
    theirs = nerfacto_with_our_weights(field)
    gradients = []
    for each in (field, theirs):
        rays = samples()
        rays.frustums.origins = rays.frustums.origins.clone().requires_grad_()
        density, features = each.get_density(rays)
        (density.sum() + features.square().sum()).backward()
        gradients.append((rays.frustums.origins.grad, each.mlp_base.model[0].hash_table.grad))
    for ours, their in zip(*gradients):
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-6)
        assert ours.any()


@pytest.mark.parametrize("bounded", [False, True])
def test_the_unit_cube_leads_back_to_the_world(bounded):
    field = build()
    if bounded:
        field.spatial_distortion, field.aabb = None, torch.nn.Parameter(torch.tensor([[-1.0, 0, -2], [3, 1, 2]]))
    places = 0.01 + 0.98 * torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    places[0] = 0.5
    world = field.to_world(places)
    torch.testing.assert_close(field.to_unit_cube(world), places, atol=1e-5, rtol=0)
    assert float(world.detach().abs().max()) > (2.5 if bounded else 10)


def test_a_scene_within_bounds_is_nerfactos_too():
    field, theirs = build(), build(NerfactoField)
    field.load_state_dict(theirs.state_dict(), strict=False)
    for each in (field, theirs):
        each.spatial_distortion = None
    for ours, their in zip(field.get_density(samples()), theirs.get_density(samples())):
        assert torch.equal(ours, their)


def test_a_field_without_appearance_is_nerfactos_too():
    field, theirs = build(appearance_embedding_dim=0), build(NerfactoField, appearance_embedding_dim=0)
    field.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(rgb_of(field, samples()), rgb_of(theirs, samples()))


def test_zero_appearance_is_nerfactos_if_the_average_is_not_wanted():
    field = build(use_average_appearance_embedding=False).eval()
    theirs = build(NerfactoField, use_average_appearance_embedding=False).eval()
    field.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(rgb_of(field, samples()), rgb_of(theirs, samples()))


def test_a_single_ray_keeps_its_shape():
    field = build()
    assert rgb_of(field, samples(rays=1)).shape == (1, 4, 3)
    assert rgb_of(field, samples(rays=3, count=1)).shape == (3, 1, 3)


def test_the_shown_views_appearance_is_the_one_that_training_uses():
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
def test_relevance_is_in_the_unit_range_with_the_samples_shape(relevance_input):
    field = build(relevance_input=relevance_input)
    _, features = field.get_density(samples())
    result = field.get_relevance(samples(), features)
    assert result.shape == (6, 4, 1)
    assert 0 <= float(result.min()) < float(result.max()) <= 1


@INPUTS
def test_relevance_belongs_to_the_place_and_not_to_the_direction_or_view(relevance_input):
    field = build(relevance_input=relevance_input)
    there = samples()
    positions = there.frustums.get_positions().detach()
    elsewhere = samples(view=0)
    elsewhere.frustums.directions = -elsewhere.frustums.directions
    middle = (elsewhere.frustums.starts + elsewhere.frustums.ends) / 2
    elsewhere.frustums.origins = positions - elsewhere.frustums.directions * middle
    torch.testing.assert_close(
        field.get_relevance(elsewhere, field.get_density(elsewhere)[1]),
        field.get_relevance(there, field.get_density(there)[1]),
        atol=1e-4,
        rtol=0,
    )


@INPUTS
def test_the_relevance_heads_gradient_reaches_the_relevance_head_alone(relevance_input):
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
def test_every_parameter_belongs_to_one_of_the_two_groups(relevance_input):
    field = build(relevance_input=relevance_input)
    scene, head = ({id(p) for p in group} for group in (field.scene_parameters(), field.relevance_parameters()))
    assert not scene & head
    assert scene | head == {id(p) for p in field.parameters()}


def test_the_scenes_parameters_are_nerfactos_in_its_order():
    # Adam's saved state is by position, so the order decides what a resumed run gets.
    ours, theirs = build(), build(NerfactoField)
    assert [p.shape for p in ours.scene_parameters()] == [p.shape for p in theirs.parameters()]
