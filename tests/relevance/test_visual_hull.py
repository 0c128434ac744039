"""Visual hull of relevance: projection into views, quantile over the views, grid, samples of rays."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.model_components.ray_samplers import UniformLinDispPiecewiseSampler

from wys_nerfstudio.relevance import visual_hull
from wys_nerfstudio.relevance.visual_hull import (
    RelevanceHull,
    free_space,
    free_space_relevance,
    project,
    surface_relevance,
)

WIDTH, HEIGHT = 24, 18
DISTORTIONS = {
    "none": None,
    "some": (0.05, -0.02, 0.01, 0.0, 0.02, -0.03),
    "barrel": (-0.12, 0.01, 0, 0, 0, 0),
    "high orders": (0.02, 0.01, 0.2, 0.3, 0, 0),
}


def ring(views: int, distance: float = 1.0, lens: CameraType = CameraType.PERSPECTIVE, distortion=None) -> Cameras:
    """Cameras on a ring around the origin, aimed at it from alternating heights."""
    poses = []
    for view in range(views):
        angle = 2 * math.pi * view / views
        back = torch.tensor([math.cos(angle), math.sin(angle), 0.4 * (-1) ** view])
        back = back / back.norm()
        right = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), back)
        right = right / right.norm()
        poses.append(torch.stack([right, torch.linalg.cross(back, right), back, distance * back], dim=1))
    params = None if distortion is None else torch.tensor([distortion]).repeat(views, 1)
    return Cameras(torch.stack(poses), 25.0, 22.0, 11.5, 9.5, WIDTH, HEIGHT, distortion_params=params, camera_type=lens)


# -------------------------------------------------------------------------------------------------------- projection


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lens=st.sampled_from([CameraType.PERSPECTIVE, CameraType.FISHEYE]),
    distortion=st.sampled_from(sorted(DISTORTIONS)),
)
def test_projection_is_the_inverse_of_ray_generation(seed: int, lens: CameraType, distortion: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    cameras = ring(3, lens=lens, distortion=DISTORTIONS[distortion])
    for view in range(3):
        coords = torch.rand(7, 2, generator=generator) * torch.tensor([HEIGHT, WIDTH])
        rays = cameras.generate_rays(camera_indices=view, coords=coords)
        lengths = 0.1 + 3 * torch.rand(7, 1, generator=generator)
        pixels, distance, within = project(rays.origins + lengths * rays.directions, cameras)
        torch.testing.assert_close(pixels[view], coords.flip(-1), atol=2e-2, rtol=0)
        torch.testing.assert_close(distance[view], lengths[:, 0], atol=1e-4, rtol=1e-4)
        assert within[view].all()


def test_points_behind_or_beside_a_view_are_not_within_it() -> None:
    camera = Cameras(torch.eye(4)[None, :3], 25.0, 25.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    points = torch.tensor([[0.0, 0, -1], [0, 0, 1], [0.1, -0.1, 1], [0.6, 0, -1], [0.4, 0, -1], [0, 0.4, -1]])
    assert project(points, camera)[2].tolist() == [[True, False, False, False, True, False]]


def test_distortion_maps_no_point_far_outside_into_the_view() -> None:
    camera = Cameras(
        torch.eye(4)[None, :3], 25.0, 25.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT,
        distortion_params=torch.tensor([[-0.3, 0, 0, 0, 0, 0]]),
    )  # fmt: skip
    pixels, _, within = project(torch.tensor([[1.8, 0, -1.0], [0.4, 0, -1.0]]), camera)
    assert 0 <= pixels[0, 0, 0] < WIDTH and 0 <= pixels[0, 0, 1] < HEIGHT  # 1.8 - 0.3 * 1.8^3 = 0.05
    assert within.tolist() == [[False, True]]


# -------------------------------------------------------------------------------------------------- quantile of views


Place = tuple[int, float, float]
Index = tuple[int, int, int]


def interpolated(maps: torch.Tensor, place: Place) -> float:
    """Value of a map at (view, row, column), in shares of its height and width, between the centers of its pixels."""
    view, row, column = place
    height, width = maps.shape[1:]
    y, x = min(max(row * height - 0.5, 0), height - 1), min(max(column * width - 0.5, 0), width - 1)
    value = 0.0
    for j in (math.floor(y), math.ceil(y)):
        for i in (math.floor(x), math.ceil(x)):
            share = (1 - abs(y - j) if j != y else 0.5) * (1 - abs(x - i) if i != x else 0.5)
            value += share * float(maps[view, j, i])
    return value


def visible_at(point: torch.Tensor, cameras: Cameras, depths: torch.Tensor) -> list[tuple[Place, Index]]:
    """Place and cell (view, row, column) of a point in each view that shows it, for undistorted perspective cameras."""
    rows, columns = depths.shape[1:]
    positions = []
    for view in range(len(cameras)):
        pose = cameras.camera_to_worlds[view]
        x, y, z = (float(torch.dot(point - pose[:, 3], pose[:, axis])) for axis in range(3))
        if z >= 0:
            continue
        column = float(cameras.fx[view]) * x / -z + float(cameras.cx[view])
        row = float(cameras.fy[view]) * -y / -z + float(cameras.cy[view])
        if not (0 <= column < WIDTH and 0 <= row < HEIGHT):
            continue
        cell = view, int(row / HEIGHT * rows), int(column / WIDTH * columns)
        if math.sqrt(x**2 + y**2 + z**2) < 1.02 * float(depths[cell]):
            positions.append(((view, row / HEIGHT, column / WIDTH), cell))
    return positions


def slow_free_space_relevance(
    points: torch.Tensor, cameras: Cameras, maps: torch.Tensor, surfaces: torch.Tensor, depths: torch.Tensor
) -> list[float]:
    """Reference of `free_space_relevance`, point by point."""
    results = []
    for point in points:
        visible = visible_at(point, cameras, depths)
        if len(visible) < max(3, len(cameras) / 10):
            results.append(0.0)
            continue
        reached_values = sorted(interpolated(maps, place) for place, _ in visible)
        explained_values = sorted(float(surfaces[cell]) for _, cell in visible)
        reached, explained = (values[len(values) // 4] for values in (reached_values, explained_values))
        results.append(max(0.0, min(reached, 4 * (reached - explained))))
    return results


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), views=st.integers(1, 9))
def test_free_space_relevance_equals_its_slow_reference(seed: int, views: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(views, 5, 7, generator=generator)  # of any size
    surfaces, depths = torch.rand(2, views, 4, 6, generator=generator)
    points = torch.rand(40, 3, generator=generator) * 1.4 - 0.7
    values = free_space_relevance(points, ring(views), maps, surfaces, depths + 0.5)
    assert values.tolist() == pytest.approx(
        slow_free_space_relevance(points, ring(views), maps, surfaces, depths + 0.5), abs=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), views=st.integers(1, 7))
def test_surface_relevance_equals_its_slow_reference(seed: int, views: int) -> None:
    generator, cameras = torch.Generator().manual_seed(seed), ring(views)
    maps = torch.rand(views, HEIGHT, WIDTH, generator=generator)
    depths = torch.rand(views, 2, 8, generator=generator) + 0.5  # centers of cells lie within pixels
    result = surface_relevance(cameras, maps, depths)
    for view in range(views):
        for j in range(2):
            for i in range(8):
                center = torch.tensor([[(j + 0.5) * HEIGHT / 2, (i + 0.5) * WIDTH / 8]])
                ray = cameras.generate_rays(camera_indices=view, coords=center)
                point = (ray.origins + ray.directions * depths[view, j, i])[0]
                values = sorted(interpolated(maps, place) for place, _ in visible_at(point, cameras, depths))
                assert float(result[view, j, i]) == pytest.approx(values[len(values) // 4], abs=1e-5)


def origin_relevance(maps: torch.Tensor, surface: float = 0.0, hidden: int = 0) -> float:
    """Relevance of the origin, which all views show except those with a surface in front of it."""
    views = len(maps)
    depths = torch.full((views, 2, 2), 9.0)
    depths[:hidden] = 0.5
    return float(free_space_relevance(torch.zeros(1, 3), ring(views), maps, torch.full((views, 2, 2), surface), depths))


@pytest.mark.parametrize(("unlike", "expected"), [(0, 1.0), (2, 1.0), (3, 0.0), (8, 0.0)])
def test_a_quarter_of_the_views_may_disagree(unlike: int, expected: float) -> None:
    maps = torch.ones(8, HEIGHT, WIDTH)
    maps[:unlike] = 0
    assert origin_relevance(maps) == expected


@pytest.mark.parametrize(
    ("visible", "views", "expected"), [(2, 2, 0), (2, 5, 0), (3, 3, 1), (3, 5, 1), (3, 31, 0), (4, 31, 1)]
)
def test_points_visible_in_too_few_views_are_irrelevant(visible: int, views: int, expected: float) -> None:
    assert origin_relevance(torch.ones(views, HEIGHT, WIDTH), hidden=views - visible) == expected


@pytest.mark.parametrize(("surface", "expected"), [(0.0, 0.8), (0.6, 0.8), (0.7, 0.4), (0.8, 0.0), (1.0, 0.0)])
def test_relevance_explained_by_surfaces_is_subtracted(surface: float, expected: float) -> None:
    assert origin_relevance(torch.full((8, HEIGHT, WIDTH), 0.8), surface) == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------------------------------- grid


CENTER, RADIUS = torch.tensor([0.15, -0.1, 0.1]), 0.2


def silhouettes(cameras: Cameras) -> torch.Tensor:
    """Silhouettes of a sphere in the views: 1 inside."""
    views = []
    for view in range(len(cameras)):
        rays = cameras.generate_rays(camera_indices=view)
        offset = CENTER - rays.origins
        along = (offset * rays.directions).sum(dim=-1, keepdim=True)
        views.append(((offset - along * rays.directions).norm(dim=-1) < RADIUS).float())
    return torch.stack(views)


def to_world(positions: torch.Tensor) -> torch.Tensor:
    return positions * 4 - 2


def build_hull(cameras: Cameras, maps: torch.Tensor, depth: float) -> RelevanceHull:
    hull = RelevanceHull()
    hull.build(to_world, cameras, maps, maps, torch.full((len(cameras), 2, 2), depth))
    return hull


def grid() -> torch.Tensor:
    axis = torch.linspace(0.5 / visual_hull.RESOLUTION, 1 - 0.5 / visual_hull.RESOLUTION, visual_hull.RESOLUTION)
    return to_world(torch.cartesian_prod(axis, axis, axis).flip(-1).view(*[visual_hull.RESOLUTION] * 3, 3))


def test_the_hull_of_silhouettes_covers_the_object() -> None:
    cameras = ring(24)
    hull = build_hull(cameras, silhouettes(cameras), 9.0)
    occupied, sphere = hull.relevance > 0.5, (grid() - CENTER).norm(dim=-1) < RADIUS
    overlap = int((occupied & sphere).sum()) / int((occupied | sphere).sum())
    assert overlap > 0.7  # measured: 0.81; a visual hull contains its object
    assert int((sphere & ~occupied).sum()) < 0.02 * int(sphere.sum())


def test_the_hull_is_empty_behind_surfaces() -> None:
    cameras = ring(24)
    assert not (build_hull(cameras, silhouettes(cameras), 0.5).relevance > 0.5).any()


@pytest.mark.parametrize(
    ("sphere", "clamped", "expected"), [(0.9, 0.25, 0.9), (0.9, 1, 1), (0.3, 0.25, 0.2), (0.3, 0.2, 0.2), (0.3, 1, 0.8)]
)
def test_the_hull_is_rescaled_to_clamped_relevance(sphere: float, clamped: float, expected: float, monkeypatch) -> None:
    """Surfaces of 0.25 leave 0.9, or 0.2 of 0.3, in free space; the hull is scaled like the higher of both under the clamp."""
    cameras = ring(12)
    unclamped_maps = sphere * silhouettes(cameras)
    monkeypatch.setattr(
        visual_hull,
        "surface_relevance",
        lambda _cameras, maps, depths: torch.full_like(depths, 0.25 if maps is unclamped_maps else clamped),
    )
    hull = RelevanceHull()
    hull.build(to_world, cameras, unclamped_maps.clone(), unclamped_maps, torch.full((12, 2, 2), 9.0))
    assert float(hull.relevance.max()) == pytest.approx(expected)


def test_the_hull_of_given_masks_contains_the_surfaces_in_them() -> None:
    """Views from above a plane that is inside the masks on one side."""
    poses = torch.eye(4)[None, :3].repeat(9, 1, 1)
    poses[:, :, 3] = torch.cat([torch.cartesian_prod(*2 * [torch.tensor([-0.5, 0, 0.5])]), torch.ones(9, 1)], dim=1)
    cameras = Cameras(poses, 8.0, 8.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    rays = [cameras.generate_rays(camera_indices=view) for view in range(9)]
    distances = torch.stack([(-0.5 - r.origins[..., 2]) / r.directions[..., 2] for r in rays])
    points = torch.stack([r.origins for r in rays]) + distances[..., None] * torch.stack([r.directions for r in rays])
    masks = (points[..., 0] > 0).float()
    hull = RelevanceHull()
    hull.build(to_world, cameras, masks, masks, distances, on_surfaces=True)
    ground = torch.tensor([[0.5, 0.0, -0.48], [0.5, 0.3, -0.48], [-0.5, 0.0, -0.48], [-0.5, 0.3, -0.48]])
    assert (hull((ground + 2) / 4) > 0.5).tolist() == [True, True, False, False]


def test_relevant_ground_leaves_the_space_above_irrelevant() -> None:
    """Views from above a plane that is relevant everywhere, or only in the silhouettes of a sphere above it."""
    poses = torch.eye(4)[None, :3].repeat(9, 1, 1)
    poses[:, :, 3] = torch.cat([torch.cartesian_prod(*2 * [torch.tensor([-0.5, 0, 0.5])]), torch.ones(9, 1)], dim=1)
    cameras = Cameras(poses, 8.0, 8.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    rays = [cameras.generate_rays(camera_indices=view) for view in range(9)]
    ground_distances = torch.stack([(-0.5 - r.origins[..., 2]) / r.directions[..., 2] for r in rays])
    occupied = []
    for maps in (torch.ones(9, HEIGHT, WIDTH), silhouettes(cameras)):
        hull = RelevanceHull()
        hull.build(to_world, cameras, maps, maps, ground_distances)
        occupied.append(hull.relevance > 0.5)
    sphere = (grid() - CENTER).norm(dim=-1) < RADIUS
    assert not occupied[0].any()
    covered = int((occupied[1] & sphere).sum()) / int(sphere.sum())
    assert covered > 0.8  # measured: 0.86; relevant ground lies behind the lower part of the sphere


def test_the_grid_is_refined_where_it_is_relevant() -> None:
    cameras = ring(12)
    maps = torch.nn.functional.avg_pool2d(silhouettes(cameras)[:, None], 3, 1, 1)[:, 0]
    hull, depths = build_hull(cameras, maps, 9.0), torch.full((12, 2, 2), 9.0)
    surfaces = surface_relevance(cameras, maps, depths)
    expected = free_space_relevance(grid().view(-1, 3), cameras, maps, surfaces, depths).view_as(hull.relevance)
    relevant = expected >= 0.25  # adjacent to relevant cells of the coarse grid
    assert int(relevant.sum()) > 1000
    torch.testing.assert_close(hull.relevance[relevant], expected[relevant], atol=1e-5, rtol=0)
    assert float(hull.relevance[~relevant].max()) < 0.25


def test_cameras_in_double_precision_give_the_same_hull() -> None:
    single, double = ring(12), ring(12)
    double.fx, double.fy, double.cx, double.cy = (x.double() for x in (single.fx, single.fy, single.cx, single.cy))
    first, second = (build_hull(cameras, silhouettes(single), 9.0).relevance for cameras in (single, double))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_unsupported_cameras_give_an_empty_hull() -> None:
    cameras = ring(8, lens=CameraType.EQUIRECTANGULAR)
    hull = build_hull(cameras, torch.ones(8, HEIGHT, WIDTH), 9.0)
    assert hull.known and not hull.relevance.any()


def test_the_hull_is_unknown_before_building_and_after_reset() -> None:
    assert not RelevanceHull().known
    hull = build_hull(ring(4), torch.zeros(4, HEIGHT, WIDTH), 1.0)
    assert hull.known and float(hull(torch.rand(5, 3)).max()) == 0
    hull.reset()
    assert not hull.known and hull(torch.rand(5, 3)).tolist() == pytest.approx([-1] * 5)


def test_lookups_interpolate_between_grid_points() -> None:
    hull = RelevanceHull()
    with torch.no_grad():
        hull.relevance.copy_(torch.rand(hull.relevance.shape, generator=torch.Generator().manual_seed(0)))
    z, y, x = 10, 20, 30
    at = (torch.tensor([[x, y, z], [x + 1, y, z], [x + 0.25, y, z]]) + 0.5) / visual_hull.RESOLUTION
    first, second = hull.relevance[z, y, x], hull.relevance[z, y, x + 1]
    expected = torch.stack([first, second, 0.75 * first + 0.25 * second])
    torch.testing.assert_close(hull(at), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(hull(at.view(1, 3, 1, 3)), expected.view(1, 3, 1), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------------- rays


@pytest.mark.parametrize("surface", [3, 17, None])
def test_free_space_samples_end_at_the_first_surface(surface: int | None) -> None:
    directions = torch.nn.functional.normalize(torch.tensor([[0.1, 0.2, -1.0], [0.0, 0.3, 1.0]]), dim=-1)
    origins = torch.tensor([[0.1, 0.0, 0.5], [-0.3, 0.2, 0.0]])
    bundle = RayBundle(
        origins, directions, torch.ones(2, 1), nears=torch.full((2, 1), 0.05), fars=torch.full((2, 1), 99.0)
    )
    samples = UniformLinDispPiecewiseSampler(num_samples=20).eval()(bundle)
    weights = torch.zeros(2, 20, 1)
    weights[:, 1] = 0.3
    if surface is not None:
        weights[:, surface] = 0.3
    points = free_space(samples, weights)
    assert points.shape == (2, visual_hull.SAMPLES, 3)
    distances = ((points - origins[:, None]) * directions[:, None]).sum(dim=-1)
    torch.testing.assert_close(origins[:, None] + distances[..., None] * directions[:, None], points)
    end = samples.frustums.starts[:, 19 if surface is None else surface, 0]
    assert (distances > 0.05).all() and (distances.diff(dim=-1) > 0).all()
    assert (distances[:, -1] < end).all() and (
        distances[:, -1] > samples.frustums.starts[:, (surface or 19) - 1, 0]
    ).all()
