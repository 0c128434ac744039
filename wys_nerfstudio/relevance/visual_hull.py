"""Relevance in mid-air: the visual hull of the views' relevance maps.

The relevance head knows surfaces. What an instruction adds in mid-air, say a hat, has none yet: every view's map shows it
before another piece of background, and on the background the maps contradict each other. In space they agree. So they are
intersected there, as silhouettes are for a visual hull (Laurentini, 1994): a point of free space is as relevant as three quarters
of the views that look through it find it, unless surfaces explain that. Rays are followed to their first surface; what lies on it is
the relevance head's.

What is intersected is relevance before its outliers are clamped. A clamp that suits surfaces makes the halo around an object as
relevant as the object; on the surfaces behind, the halos of different views contradict each other, but in mid-air they do not. For
the same reason these maps are asked what the surfaces explain, not the relevance head, which is trained on clamped ones. What has
been found is then put on the scale of clamped relevance.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RaySamples
from torch import Tensor, nn
from torch.nn import functional as F

RESOLUTION = 96
"""Points per side of the grid that relevance is kept on; even."""
MIN_RELEVANCE = 0.1
"""Where a grid of half the resolution finds nothing more relevant, it is not refined."""
CHUNK = 8192
"""Points that are looked at together."""
SAMPLES = 64
"""Points per ray at which it is looked up."""
VIEW_QUANTILE = 0.75
"""Share of the views through a point that must find it relevant."""
FEWEST_VIEWS, FEWEST_SHARE = 3, 0.1
"""What fewer views, or a smaller share of them, look through has no known place and is not relevant: a point right before a
camera is seen by its neighbours alone, all from the same side."""
DEPTH_MARGIN = 1.02
"""A point is hidden from a view if it is so many times as far as the surface there: depths are known for cells, not for pixels."""
UNEXPLAINED = 4.0
"""A point has its whole relevance if the surfaces behind it leave a quarter of it unexplained, and less in proportion."""
PEAK_QUANTILE = 0.999
"""Quantile of the surfaces' relevance that stands for the most relevant of them."""
LENSES = (CameraType.PERSPECTIVE.value, CameraType.FISHEYE.value)
"""Cameras that points can be projected into."""


def project(
    points: Float[Tensor, "n 3"], cameras: Cameras
) -> tuple[Float[Tensor, "b n 2"], Float[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Where points appear in views: the inverse of `Cameras.generate_rays`.

    Args:
        points: Positions in the world.
        cameras: Perspective or fisheye cameras, with or without distortion.

    Returns:
        Columns and rows in pixels, distances from the cameras, and whether a point lies within the view (elsewhere, columns
        and rows mean nothing).
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
    # Far beyond a picture's corners the distortion's polynomial may come back into it.
    within &= angle <= 1.01 * _widest_angle(cameras)
    return torch.stack([columns, rows], dim=-1), distance, within


def _widest_angle(cameras: Cameras) -> Float[Tensor, "b 1"]:
    """The angle between each view's corners and its axis."""
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
    """Relevance of points of free space: what three quarters of the views that see them reach in their maps, as far as that is
    more than what three quarters of them see on the surfaces behind.

    Args:
        points: Positions in the world.
        cameras: Those of the views; perspective or fisheye.
        maps: Relevance of the views in [0, 1].
        surfaces: Relevance of the surfaces that the views see.
        depths: Distances of these surfaces.

    Returns:
        Values in [0, 1]; 0 for what too few of them see.
    """
    places, seen = _views_of(points, cameras, depths)
    claimed, explained = _agreed(maps, places, seen), _agreed(surfaces, places, seen)
    value = torch.minimum(claimed, (UNEXPLAINED * (claimed - explained)).clamp_min(0))
    return torch.where(seen.sum(dim=0) >= max(FEWEST_VIEWS, FEWEST_SHARE * len(maps)), value, 0.0)


def surface_relevance(
    cameras: Cameras, maps: Float[Tensor, "b h w"], depths: Float[Tensor, "b rows columns"]
) -> Float[Tensor, "b rows columns"]:
    """Relevance of the surfaces that views see: what three quarters of the views that see them, too, reach in their maps.

    Args:
        cameras: As for `free_space_relevance`.
        maps: As for `free_space_relevance`.
        depths: As for `free_space_relevance`.
    """
    views, rows, columns = depths.shape
    size = torch.stack([cameras.height[0, 0] / rows, cameras.width[0, 0] / columns])
    cells = torch.cartesian_prod(*(torch.arange(n, device=depths.device) for n in (rows, columns)))
    indices = torch.arange(views, device=depths.device).repeat_interleave(len(cells))
    rays = cameras.generate_rays(indices[:, None], coords=((cells + 0.5) * size).repeat(views, 1))
    points = rays.origins + rays.directions * depths.reshape(-1, 1)
    parts = (_agreed(maps, *_views_of(part, cameras, depths)) for part in points.split(CHUNK))
    return torch.cat(list(parts)).view_as(depths).clamp(max=1)


def _views_of(
    points: Float[Tensor, "n 3"], cameras: Cameras, depths: Float[Tensor, "b rows columns"]
) -> tuple[Float[Tensor, "b n 2"], Bool[Tensor, "b n"]]:
    """Places of points in the views, 0 to 1 from corner to corner, and which views see them."""
    pixels, distance, within = project(points, cameras)
    places = pixels / torch.cat([cameras.width, cameras.height], dim=-1)[:, None]
    return places, within & (distance < DEPTH_MARGIN * _at(depths, places))


def _agreed(
    images: Float[Tensor, "b h w"], places: Float[Tensor, "b n 2"], seen: Bool[Tensor, "b n"]
) -> Float[Tensor, " n"]:
    """What three quarters of the views that see a point reach at its places; something above 1 if none sees it."""
    beyond = 2.0  # sorts after every relevance
    values = torch.where(seen, _at(images, places), beyond).sort(dim=0).values
    return values.gather(0, (seen.sum(dim=0) * (1 - VIEW_QUANTILE)).long()[None])[0]


def _at(images: Float[Tensor, "b h w"], places: Float[Tensor, "b n 2"]) -> Float[Tensor, "b n"]:
    """Values of the nearest pixels at places in [0, 1]; beyond that those of the border."""
    (height, width), (x, y) = images.shape[1:], places.unbind(-1)
    column, row = (x * width).long().clamp(0, width - 1), (y * height).long().clamp(0, height - 1)
    return images.flatten(1).gather(1, row * width + column)


class RelevanceHull(nn.Module):
    """Relevance of free space, on a grid over the unit cube that the field's positions lie in."""

    relevance: Float[Tensor, "z y x"]
    """Values in [0, 1] at the grid's points; -1 while they are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("relevance", torch.full((RESOLUTION,) * 3, -1.0))

    @property
    def known(self) -> bool:
        """Whether the hull of the current instruction has been carved."""
        return bool(self.relevance[0, 0, 0] >= 0)

    def forget(self) -> None:
        """Begins anew, for another instruction."""
        self.relevance.fill_(-1)

    @torch.no_grad()
    def build(
        self,
        to_world: Callable[[Float[Tensor, "n 3"]], Float[Tensor, "n 3"]],
        cameras: Cameras,
        maps: Float[Tensor, "b h w"],
        unclamped_maps: Float[Tensor, "b h w"],
        depths: Float[Tensor, "b rows columns"],
    ) -> None:
        """Fills the grid from the maps of all views; from cameras of other kinds than `LENSES` with zeros.

        Args:
            to_world: From the unit cube to the world.
            cameras: As for `free_space_relevance`.
            maps: Relevance of the views in [0, 1], as the relevance head is trained on it.
            peaks: The same before outliers were clamped.
            depths: As for `free_space_relevance`.
        """
        self.relevance.zero_()
        if not all(int(kind) in LENSES for kind in cameras.camera_type.unique()):
            return
        surfaces = surface_relevance(cameras, unclamped_maps, depths)

        def values(points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
            parts = (to_world(part) for part in points.split(CHUNK))
            return torch.cat([free_space_relevance(part, cameras, unclamped_maps, surfaces, depths) for part in parts])

        coarse = values(_grid_points(RESOLUTION // 2, unclamped_maps.device)).view(1, 1, *[RESOLUTION // 2] * 3)
        worth_it = F.max_pool3d(coarse, kernel_size=3, stride=1, padding=1) >= MIN_RELEVANCE
        refined = F.interpolate(worth_it.float(), scale_factor=2, mode="nearest")[0, 0] > 0
        self.relevance.copy_(F.interpolate(coarse, scale_factor=2, mode="trilinear")[0, 0])
        if refined.any():
            self.relevance[refined] = values(_grid_points(RESOLUTION, unclamped_maps.device)[refined.view(-1)])
        clamped = surface_relevance(cameras, maps, depths).quantile(PEAK_QUANTILE)
        top = torch.maximum(surfaces.quantile(PEAK_QUANTILE), self.relevance.max())
        self.relevance *= (clamped / top.clamp_min(MIN_RELEVANCE)).clamp_min(1)

    def forward(self, positions: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs"]:
        """Relevance at positions in the unit cube, interpolated."""
        grid = self.relevance[None, None]
        places = positions.reshape(1, -1, 1, 1, 3) * 2 - 1
        values = F.grid_sample(grid, places, align_corners=False, padding_mode="border")
        return values.view(positions.shape[:-1]).clamp(max=1)  # interpolation rounds


def _grid_points(resolution: int, device: torch.device) -> Float[Tensor, "n 3"]:
    """The centres of a grid's cells in the unit cube, x fastest."""
    places = (torch.arange(resolution, device=device) + 0.5) / resolution
    z, y, x = torch.meshgrid(places, places, places, indexing="ij")
    return torch.stack([x, y, z], dim=-1).view(-1, 3)


def free_space(samples: RaySamples, weights: Float[Tensor, "rays samples 1"]) -> Float[Tensor, "rays some 3"]:
    """Points along rays from where they begin to the first surface, where half of the light is stopped.

    Args:
        samples: Where the rays were rendered.
        weights: Weights of these samples.
    """
    assert samples.spacing_starts is not None and samples.spacing_to_euclidean_fn is not None
    passed = (weights[..., 0].cumsum(dim=-1) < 0.5).sum(dim=-1, keepdim=True)
    end = samples.spacing_starts[..., 0].gather(-1, passed.clamp_max(weights.shape[-2] - 1))
    share = (torch.arange(SAMPLES, device=end.device) + 0.5) / SAMPLES
    distances = samples.spacing_to_euclidean_fn(end * share)
    return samples.frustums.origins[..., :1, :] + samples.frustums.directions[..., :1, :] * distances[..., None]
