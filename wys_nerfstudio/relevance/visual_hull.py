"""Free-space relevance: the visual hull of the views' relevance maps.

The relevance head is defined on surfaces. An object that the instruction adds, such as a hat, has no surface yet: each view's map
projects it onto another part of the background, where the maps contradict each other. In space they agree. The maps are therefore
intersected in space, like silhouettes for a visual hull (Laurentini, 1994): the relevance of a point in free space is the value
that three quarters of the maps reach there, unless it is explained by the relevance of the surfaces behind the point. Rays are
sampled up to their first surface; relevance on surfaces comes from the relevance head.

The maps are intersected before their outliers are clamped: a clamp that suits surfaces makes the halo around an object as relevant as
the object. Halos of different views contradict each other on the surfaces behind, but not in free space. The relevance that surfaces
explain is computed from the same unclamped maps, not from the relevance head, which is trained on clamped maps. The result is
rescaled to the range of clamped relevance.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RaySamples
from torch import Tensor, nn
from torch.nn import functional as F

RESOLUTION = 96
"""Grid points per side; even."""
MIN_RELEVANCE = 0.1
"""A grid of half the resolution is refined only where its relevance reaches this value."""
CHUNK = 8192
"""Points per batch."""
SAMPLES = 64
"""Samples per ray at which free-space relevance is evaluated."""
VIEW_QUANTILE = 0.75
"""Share of the views of a point whose maps must reach its relevance."""
MIN_VIEWS, MIN_VIEW_SHARE = 3, 0.1
"""Points visible in fewer views, or in a smaller share of them, have relevance 0: a point just in front of a camera is visible
to neighboring cameras only, all from the same side."""
DEPTH_MARGIN = 1.02
"""A point is occluded if its distance exceeds that of the surface by this factor: depths are per cell, not per pixel."""
UNEXPLAINED_GAIN = 4.0
"""A point keeps its full relevance if the surfaces behind it leave a quarter of it unexplained, and proportionally less below."""
PEAK_QUANTILE = 0.999
"""Quantile of the surfaces' relevance that is used as its maximum."""
CAMERA_TYPES = (CameraType.PERSPECTIVE.value, CameraType.FISHEYE.value)
"""Supported camera types."""


def project(
    points: Float[Tensor, "n 3"], cameras: Cameras
) -> tuple[Float[Tensor, "b n 2"], Float[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Project points into views: the inverse of `Cameras.generate_rays`.

    Args:
        points: World positions.
        cameras: Perspective or fisheye cameras, with or without distortion.

    Returns:
        Columns and rows in pixels, distances from the cameras, and whether a point lies within the view (columns and rows are
        undefined elsewhere).
    """
    offset = points - cameras.camera_to_worlds[:, None, :, 3]
    local = torch.einsum("bnj,bji->bni", offset, cameras.camera_to_worlds[:, :, :3])
    across, distance = local[..., :2].norm(dim=-1), offset.norm(dim=-1)
    angle = torch.atan2(across, -local[..., 2])
    fisheye = cameras.camera_type == CameraType.FISHEYE.value
    radius = torch.where(fisheye, angle, angle.clamp(max=1.57).tan())
    x, y = (local[..., :2] * (radius / across.clamp_min(1e-9))[..., None] * local.new_tensor([1, -1])).unbind(-1)
    if cameras.distortion_params is not None:
        k1, k2, k3, k4, p1, p2 = cameras.distortion_params[:, None].unbind(-1)
        r = x**2 + y**2
        radial = 1 + r * (k1 + r * (k2 + r * (k3 + r * k4)))
        x, y = (
            x * radial + 2 * p1 * x * y + p2 * (r + 2 * x**2),
            y * radial + 2 * p2 * x * y + p1 * (r + 2 * y**2),
        )
    columns, rows = cameras.fx * x + cameras.cx, cameras.fy * y + cameras.cy
    within = (columns >= 0) & (columns < cameras.width) & (rows >= 0) & (rows < cameras.height)
    # Far outside the image the distortion polynomial may map points back into it.
    within &= angle <= 1.01 * _widest_angle(cameras)
    return torch.stack([columns, rows], dim=-1), distance, within


def _widest_angle(cameras: Cameras) -> Float[Tensor, "b 1"]:
    """Return the largest angle between each view's axis and its corners."""
    width, height = float(cameras.width.max()), float(cameras.height.max())
    corners = cameras.fx.new_tensor([[0, 0], [0, width], [height, 0], [height, width]])
    indices = torch.arange(len(cameras), device=corners.device)
    rays = cameras.generate_rays(indices.repeat_interleave(4)[:, None], coords=corners.repeat(len(cameras), 1))
    axes = -cameras.camera_to_worlds[:, None, :, 2]
    return (rays.directions.view(-1, 4, 3) * axes).sum(dim=-1).clamp(-1, 1).acos().amax(dim=1, keepdim=True)


def free_space_relevance(
    points: Float[Tensor, "n 3"],
    cameras: Cameras,
    maps: Float[Tensor, "b h w"],
    surfaces: Float[Tensor, "b rows columns"],
    depths: Float[Tensor, "b rows columns"],
) -> Float[Tensor, " n"]:
    """Return the relevance of points in free space.

    It is the value that three quarters of the views of a point reach in their maps, as far as it exceeds the value that three
    quarters of them reach on the surfaces behind the point.

    Args:
        points: World positions.
        cameras: Cameras of the views; perspective or fisheye.
        maps: Relevance of the views in [0, 1], of any size.
        surfaces: Relevance of the visible surfaces of each view.
        depths: Distances of these surfaces.

    Returns:
        Values in [0, 1]; 0 for points visible in too few views.
    """
    positions, visible = _project_visible(points, cameras, depths)
    reached = _view_quantile(_sample_linear(maps, positions), visible)
    explained = _view_quantile(_sample_nearest(surfaces, positions), visible)
    value = torch.minimum(reached, (UNEXPLAINED_GAIN * (reached - explained)).clamp_min(0))
    return torch.where(visible.sum(dim=0) >= max(MIN_VIEWS, MIN_VIEW_SHARE * len(maps)), value, 0.0)


def surface_relevance(
    cameras: Cameras, maps: Float[Tensor, "b h w"], depths: Float[Tensor, "b rows columns"]
) -> Float[Tensor, "b rows columns"]:
    """Return the relevance of each view's visible surfaces: the value that three quarters of the views of a surface reach.

    Args:
        cameras: As in `free_space_relevance`.
        maps: As in `free_space_relevance`.
        depths: As in `free_space_relevance`.
    """
    views, rows, columns = depths.shape
    size = torch.stack([cameras.height[0, 0] / rows, cameras.width[0, 0] / columns])
    cells = torch.cartesian_prod(*(torch.arange(n, device=depths.device) for n in (rows, columns)))
    indices = torch.arange(views, device=depths.device).repeat_interleave(len(cells))
    rays = cameras.generate_rays(indices[:, None], coords=((cells + 0.5) * size).repeat(views, 1))
    points = rays.origins + rays.directions * depths.reshape(-1, 1)
    parts = []
    for part in points.split(CHUNK):
        positions, visible = _project_visible(part, cameras, depths)
        parts.append(_view_quantile(_sample_linear(maps, positions), visible))
    return torch.cat(parts).view_as(depths).clamp(max=1)


def _project_visible(
    points: Float[Tensor, "n 3"], cameras: Cameras, depths: Float[Tensor, "b rows columns"]
) -> tuple[Float[Tensor, "b n 2"], Bool[Tensor, "b n"]]:
    """Return the positions of points in the views, in [0, 1] from corner to corner, and whether they are visible there."""
    pixels, distance, within = project(points, cameras)
    positions = pixels / torch.cat([cameras.width, cameras.height], dim=-1)[:, None]
    return positions, within & (distance < DEPTH_MARGIN * _sample_nearest(depths, positions))


def _view_quantile(values: Float[Tensor, "b n"], visible: Bool[Tensor, "b n"]) -> Float[Tensor, " n"]:
    """Return the value that three quarters of the views of a point reach there; above 1 if no view shows the point."""
    invisible = 2.0  # sorts after every relevance
    ordered = torch.where(visible, values, invisible).sort(dim=0).values
    return ordered.gather(0, (visible.sum(dim=0) * (1 - VIEW_QUANTILE)).long()[None])[0]


def _sample_linear(images: Float[Tensor, "b h w"], positions: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n"]:
    """Return bilinearly interpolated values at positions in [0, 1], those of the border outside."""
    grid = (positions[:, :, None] * 2 - 1).to(images)  # cameras of some formats are in double precision
    return F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0, :, 0]


def _sample_nearest(images: Float[Tensor, "b h w"], positions: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n"]:
    """Return the values of the nearest pixels at positions in [0, 1], clamped to the border."""
    (height, width), (x, y) = images.shape[1:], positions.unbind(-1)
    column, row = (x * width).long().clamp(0, width - 1), (y * height).long().clamp(0, height - 1)
    return images.flatten(1).gather(1, row * width + column)


class RelevanceHull(nn.Module):
    """Free-space relevance on a grid over the unit cube of the field's positions."""

    relevance: Float[Tensor, "z y x"]
    """Values in [0, 1] at the grid points; -1 while unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("relevance", torch.full((RESOLUTION,) * 3, -1.0))

    @property
    def known(self) -> bool:
        """Whether the hull of the current instruction has been built."""
        return bool(self.relevance[0, 0, 0] >= 0)

    def reset(self) -> None:
        """Mark all values as unknown, for another instruction."""
        self.relevance.fill_(-1)

    @torch.no_grad()
    def build(
        self,
        to_world: Callable[[Float[Tensor, "n 3"]], Float[Tensor, "n 3"]],
        cameras: Cameras,
        maps: Float[Tensor, "b mh mw"],
        unclamped_maps: Float[Tensor, "b uh uw"],
        depths: Float[Tensor, "b rows columns"],
        on_surfaces: bool = False,
    ) -> None:
        """Fill the grid from the maps of all views, or with zeros if a camera's type is not one of `CAMERA_TYPES`.

        Args:
            to_world: Map from the unit cube to the world.
            cameras: As in `free_space_relevance`.
            maps: Relevance of the views in [0, 1], the targets of the relevance head; of any size.
            unclamped_maps: The same maps before outliers were clamped; of any size.
            depths: As in `free_space_relevance`.
            on_surfaces: Keep the relevance that surfaces explain, because no relevance head represents it.
        """
        self.relevance.zero_()
        if not all(int(kind) in CAMERA_TYPES for kind in cameras.camera_type.unique()):
            return
        surfaces = surface_relevance(cameras, unclamped_maps, depths)

        explained = torch.zeros_like(surfaces) if on_surfaces else surfaces

        def values(points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
            parts = (to_world(part) for part in points.split(CHUNK))
            return torch.cat([free_space_relevance(part, cameras, unclamped_maps, explained, depths) for part in parts])

        coarse = values(_grid_points(RESOLUTION // 2, unclamped_maps.device)).view(1, 1, *[RESOLUTION // 2] * 3)
        relevant = F.max_pool3d(coarse, kernel_size=3, stride=1, padding=1) >= MIN_RELEVANCE
        refined = F.interpolate(relevant.float(), scale_factor=2, mode="nearest")[0, 0] > 0
        self.relevance.copy_(F.interpolate(coarse, scale_factor=2, mode="trilinear")[0, 0])
        if refined.any():
            self.relevance[refined] = values(_grid_points(RESOLUTION, unclamped_maps.device)[refined.view(-1)])
        clamped_peak = surface_relevance(cameras, maps, depths).quantile(PEAK_QUANTILE)
        peak = torch.maximum(surfaces.quantile(PEAK_QUANTILE), self.relevance.max())
        self.relevance *= (clamped_peak / peak.clamp_min(MIN_RELEVANCE)).clamp_min(1)

    def forward(self, positions: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs"]:
        """Return trilinearly interpolated relevance at positions in the unit cube."""
        grid = self.relevance[None, None]
        coordinates = positions.reshape(1, -1, 1, 1, 3) * 2 - 1
        values = F.grid_sample(grid, coordinates, align_corners=False, padding_mode="border")
        return values.view(positions.shape[:-1]).clamp(max=1)  # rounding in the interpolation


def _grid_points(resolution: int, device: torch.device) -> Float[Tensor, "n 3"]:
    """Return the centers of a grid's cells in the unit cube, x fastest."""
    centers = (torch.arange(resolution, device=device) + 0.5) / resolution
    z, y, x = torch.meshgrid(centers, centers, centers, indexing="ij")
    return torch.stack([x, y, z], dim=-1).view(-1, 3)


def free_space(samples: RaySamples, weights: Float[Tensor, "rays samples 1"]) -> Float[Tensor, "rays some 3"]:
    """Return points on rays between their origin and the first surface, where accumulated weights reach one half.

    Args:
        samples: Samples of the rays.
        weights: Rendering weights of the samples.
    """
    assert samples.spacing_starts is not None and samples.spacing_to_euclidean_fn is not None
    passed = (weights[..., 0].cumsum(dim=-1) < 0.5).sum(dim=-1, keepdim=True)
    end = samples.spacing_starts[..., 0].gather(-1, passed.clamp_max(weights.shape[-2] - 1))
    share = (torch.arange(SAMPLES, device=end.device) + 0.5) / SAMPLES
    distances = samples.spacing_to_euclidean_fn(end * share)
    return samples.frustums.origins[..., :1, :] + samples.frustums.directions[..., :1, :] * distances[..., None]
