"""The visual hull of relevance: where points appear in views, what views agree on, and what rays pass."""

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
DISTORTIONS = {"none": None, "some": (0.05, -0.02, 0.01, 0.0, 0.02, -0.03), "barrel": (-0.12, 0.01, 0, 0, 0, 0)}


def ring(views: int, distance: float = 1.0, lens: CameraType = CameraType.PERSPECTIVE, distortion=None) -> Cameras:
    """Cameras around the origin, all looking there, from changing heights."""
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
def test_a_point_on_a_pixels_ray_appears_at_that_pixel(seed: int, lens: CameraType, distortion: str) -> None:
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


def test_what_lies_behind_or_beside_a_view_is_not_within_it() -> None:
    camera = Cameras(torch.eye(4)[None, :3], 25.0, 25.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    points = torch.tensor([[0.0, 0, -1], [0, 0, 1], [0.1, -0.1, 1], [0.6, 0, -1], [0.4, 0, -1], [0, 0.4, -1]])
    assert project(points, camera)[2].tolist() == [[True, False, False, False, True, False]]


def test_no_distortion_bends_what_is_far_beside_a_view_back_into_it() -> None:
    camera = Cameras(
        torch.eye(4)[None, :3], 25.0, 25.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT,
        distortion_params=torch.tensor([[-0.3, 0, 0, 0, 0, 0]]),
    )  # fmt: skip
    pixels, _, within = project(torch.tensor([[1.8, 0, -1.0], [0.4, 0, -1.0]]), camera)
    assert 0 <= pixels[0, 0, 0] < WIDTH and 0 <= pixels[0, 0, 1] < HEIGHT  # 1.8 - 0.3 * 1.8^3 = 0.05
    assert within.tolist() == [[False, True]]


# --------------------------------------------------------------------------------------------------------- agreement


Place = tuple[int, int, int]


def seen_at(point: torch.Tensor, cameras: Cameras, depths: torch.Tensor) -> list[tuple[Place, Place]]:
    """Pixel and cell (view, row, column) where a point is seen, view by view, for undistorted perspective cameras."""
    rows, columns = depths.shape[1:]
    places = []
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
            places.append(((view, int(row), int(column)), cell))
    return places


def air_twin(
    points: torch.Tensor, cameras: Cameras, maps: torch.Tensor, surfaces: torch.Tensor, depths: torch.Tensor
) -> list[float]:
    """`free_space_relevance` point by point."""
    results = []
    for point in points:
        seen = seen_at(point, cameras, depths)
        if len(seen) < max(3, len(cameras) / 10):
            results.append(0.0)
            continue
        claims = sorted(float(maps[pixel]) for pixel, _ in seen)
        explanations = sorted(float(surfaces[cell]) for _, cell in seen)
        claim, explanation = (values[len(values) // 4] for values in (claims, explanations))
        results.append(max(0.0, min(claim, 4 * (claim - explanation))))
    return results


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), views=st.integers(1, 9))
def test_points_are_as_relevant_as_three_quarters_of_the_views_through_them_say(seed: int, views: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(views, HEIGHT, WIDTH, generator=generator)
    surfaces, depths = torch.rand(2, views, 4, 6, generator=generator)
    points = torch.rand(40, 3, generator=generator) * 1.4 - 0.7
    values = free_space_relevance(points, ring(views), maps, surfaces, depths + 0.5)
    assert values.tolist() == pytest.approx(air_twin(points, ring(views), maps, surfaces, depths + 0.5), abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), views=st.integers(1, 7))
def test_surfaces_are_as_relevant_as_three_quarters_of_the_views_that_see_them_say(seed: int, views: int) -> None:
    generator, cameras = torch.Generator().manual_seed(seed), ring(views)
    maps = torch.rand(views, HEIGHT, WIDTH, generator=generator)
    depths = torch.rand(views, 2, 8, generator=generator) + 0.5  # cells whose middles lie within pixels
    result = surface_relevance(cameras, maps, depths)
    for view in range(views):
        for j in range(2):
            for i in range(8):
                middle = torch.tensor([[(j + 0.5) * HEIGHT / 2, (i + 0.5) * WIDTH / 8]])
                ray = cameras.generate_rays(camera_indices=view, coords=middle)
                point = (ray.origins + ray.directions * depths[view, j, i])[0]
                values = sorted(float(maps[pixel]) for pixel, _ in seen_at(point, cameras, depths))
                assert float(result[view, j, i]) == pytest.approx(values[len(values) // 4], abs=1e-6)


def at_the_centre(maps: torch.Tensor, surface: float = 0.0, hidden: int = 0) -> float:
    """Relevance of the point that all views look at; before it some of them have a surface."""
    views = len(maps)
    depths = torch.full((views, 2, 2), 9.0)
    depths[:hidden] = 0.5
    return float(free_space_relevance(torch.zeros(1, 3), ring(views), maps, torch.full((views, 2, 2), surface), depths))


@pytest.mark.parametrize(("denying", "wanted"), [(0, 1.0), (2, 1.0), (3, 0.0), (8, 0.0)])
def test_a_quarter_of_the_views_may_be_wrong(denying: int, wanted: float) -> None:
    maps = torch.ones(8, HEIGHT, WIDTH)
    maps[:denying] = 0
    assert at_the_centre(maps) == wanted


@pytest.mark.parametrize(
    ("seeing", "views", "wanted"), [(2, 2, 0), (2, 5, 0), (3, 3, 1), (3, 5, 1), (3, 31, 0), (4, 31, 1)]
)
def test_what_too_few_views_see_is_nowhere(seeing: int, views: int, wanted: float) -> None:
    assert at_the_centre(torch.ones(views, HEIGHT, WIDTH), hidden=views - seeing) == wanted


@pytest.mark.parametrize(("surface", "wanted"), [(0.0, 0.8), (0.6, 0.8), (0.7, 0.4), (0.8, 0.0), (1.0, 0.0)])
def test_what_the_surfaces_behind_explain_is_not_in_the_air(surface: float, wanted: float) -> None:
    assert at_the_centre(torch.full((8, HEIGHT, WIDTH), 0.8), surface) == pytest.approx(wanted, abs=1e-5)


# -------------------------------------------------------------------------------------------------------------- grid


CENTRE, RADIUS = torch.tensor([0.15, -0.1, 0.1]), 0.2


def seen_sphere(cameras: Cameras) -> torch.Tensor:
    """1 where the rays of views meet a sphere."""
    views = []
    for view in range(len(cameras)):
        rays = cameras.generate_rays(camera_indices=view)
        offset = CENTRE - rays.origins
        along = (offset * rays.directions).sum(dim=-1, keepdim=True)
        views.append(((offset - along * rays.directions).norm(dim=-1) < RADIUS).float())
    return torch.stack(views)


def to_world(places: torch.Tensor) -> torch.Tensor:
    return places * 4 - 2


def carved(cameras: Cameras, maps: torch.Tensor, depth: float) -> RelevanceHull:
    made = RelevanceHull()
    made.build(to_world, cameras, maps, maps, torch.full((len(cameras), 2, 2), depth))
    return made


def grid() -> torch.Tensor:
    axis = torch.linspace(0.5 / visual_hull.RESOLUTION, 1 - 0.5 / visual_hull.RESOLUTION, visual_hull.RESOLUTION)
    return to_world(torch.cartesian_prod(axis, axis, axis).flip(-1).view(*[visual_hull.RESOLUTION] * 3, 3))


def test_what_silhouettes_all_round_show_in_mid_air_is_found_there() -> None:
    cameras = ring(24)
    made = carved(cameras, seen_sphere(cameras), 9.0)
    found, truth = made.relevance > 0.5, (grid() - CENTRE).norm(dim=-1) < RADIUS
    assert int((found & truth).sum()) / int((found | truth).sum()) > 0.7  # 0.81; a hull is never smaller
    assert int((truth & ~found).sum()) < 0.02 * int(truth.sum())


def test_what_lies_behind_a_surface_is_not_in_the_air() -> None:
    cameras = ring(24)
    assert not (carved(cameras, seen_sphere(cameras), 0.5).relevance > 0.5).any()


@pytest.mark.parametrize(
    ("sphere", "clamped", "wanted"), [(0.9, 0.25, 0.9), (0.9, 1, 1), (0.3, 0.25, 0.2), (0.3, 0.2, 0.2), (0.3, 1, 0.8)]
)
def test_what_is_most_relevant_becomes_as_relevant_as_the_clamp_makes_surfaces(
    sphere: float, clamped: float, wanted: float, monkeypatch
) -> None:
    """Surfaces of 0.25 leave 0.9, or 0.2 of 0.3, in mid-air; both are raised as much as the clamp raises the higher of them."""
    cameras = ring(12)
    unclamped_maps = sphere * seen_sphere(cameras)
    monkeypatch.setattr(
        visual_hull,
        "surface_relevance",
        lambda _cameras, maps, depths: torch.full_like(depths, 0.25 if maps is unclamped_maps else clamped),
    )
    made = RelevanceHull()
    made.build(to_world, cameras, unclamped_maps.clone(), unclamped_maps, torch.full((12, 2, 2), 9.0))
    assert float(made.relevance.max()) == pytest.approx(wanted)


def test_above_ground_that_is_relevant_itself_the_air_is_not() -> None:
    """Views from above a plane that is relevant everywhere, or only where a view sees a sphere above it."""
    poses = torch.eye(4)[None, :3].repeat(9, 1, 1)
    poses[:, :, 3] = torch.cat([torch.cartesian_prod(*2 * [torch.tensor([-0.5, 0, 0.5])]), torch.ones(9, 1)], dim=1)
    cameras = Cameras(poses, 8.0, 8.0, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    rays = [cameras.generate_rays(camera_indices=view) for view in range(9)]
    to_the_ground = torch.stack([(-0.5 - r.origins[..., 2]) / r.directions[..., 2] for r in rays])
    found = []
    for maps in (torch.ones(9, HEIGHT, WIDTH), seen_sphere(cameras)):
        made = RelevanceHull()
        made.build(to_world, cameras, maps, maps, to_the_ground)
        found.append(made.relevance > 0.5)
    sphere = (grid() - CENTRE).norm(dim=-1) < RADIUS
    assert not found[0].any()
    assert int((found[1] & sphere).sum()) > 0.8 * int(sphere.sum())  # 0.86: its foot is seen before relevant ground


def test_the_grid_is_refined_wherever_something_is_relevant() -> None:
    cameras = ring(12)
    maps = torch.nn.functional.avg_pool2d(seen_sphere(cameras)[:, None], 3, 1, 1)[:, 0]
    made, depths = carved(cameras, maps, 9.0), torch.full((12, 2, 2), 9.0)
    surfaces = surface_relevance(cameras, maps, depths)
    wanted = free_space_relevance(grid().view(-1, 3), cameras, maps, surfaces, depths).view_as(made.relevance)
    relevant = wanted >= 0.25  # which touches what the coarse grid finds
    assert int(relevant.sum()) > 1000 and torch.equal(made.relevance[relevant], wanted[relevant])
    assert float(made.relevance[~relevant].max()) < 0.25


def test_cameras_that_points_cannot_be_projected_into_leave_the_air_empty() -> None:
    cameras = ring(8, lens=CameraType.EQUIRECTANGULAR)
    made = carved(cameras, torch.ones(8, HEIGHT, WIDTH), 9.0)
    assert made.known and not made.relevance.any()


def test_the_hull_is_unknown_until_it_is_carved_and_once_it_is_forgotten() -> None:
    assert not RelevanceHull().known
    made = carved(ring(4), torch.zeros(4, HEIGHT, WIDTH), 1.0)
    assert made.known and float(made(torch.rand(5, 3)).max()) == 0
    made.reset()
    assert not made.known and made(torch.rand(5, 3)).tolist() == pytest.approx([-1] * 5)


def test_a_look_up_interpolates_between_the_grids_points() -> None:
    made = RelevanceHull()
    with torch.no_grad():
        made.relevance.copy_(torch.rand(made.relevance.shape, generator=torch.Generator().manual_seed(0)))
    z, y, x = 10, 20, 30
    at = (torch.tensor([[x, y, z], [x + 1, y, z], [x + 0.25, y, z]]) + 0.5) / visual_hull.RESOLUTION
    first, second = made.relevance[z, y, x], made.relevance[z, y, x + 1]
    wanted = torch.stack([first, second, 0.75 * first + 0.25 * second])
    torch.testing.assert_close(made(at), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(made(at.view(1, 3, 1, 3)), wanted.view(1, 3, 1), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------------- rays


@pytest.mark.parametrize("stopped", [3, 17, None])
def test_free_space_ends_where_half_of_the_light_is_stopped(stopped: int | None) -> None:
    directions = torch.nn.functional.normalize(torch.tensor([[0.1, 0.2, -1.0], [0.0, 0.3, 1.0]]), dim=-1)
    origins = torch.tensor([[0.1, 0.0, 0.5], [-0.3, 0.2, 0.0]])
    bundle = RayBundle(
        origins, directions, torch.ones(2, 1), nears=torch.full((2, 1), 0.05), fars=torch.full((2, 1), 99.0)
    )
    samples = UniformLinDispPiecewiseSampler(num_samples=20).eval()(bundle)
    weights = torch.zeros(2, 20, 1)
    weights[:, 1] = 0.3
    if stopped is not None:
        weights[:, stopped] = 0.3
    points = free_space(samples, weights)
    assert points.shape == (2, visual_hull.SAMPLES, 3)
    distances = ((points - origins[:, None]) * directions[:, None]).sum(dim=-1)
    torch.testing.assert_close(origins[:, None] + distances[..., None] * directions[:, None], points)
    end = samples.frustums.starts[:, 19 if stopped is None else stopped, 0]
    assert (distances > 0.05).all() and (distances.diff(dim=-1) > 0).all()
    assert (distances[:, -1] < end).all() and (
        distances[:, -1] > samples.frustums.starts[:, (stopped or 19) - 1, 0]
    ).all()
