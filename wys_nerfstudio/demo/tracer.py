"""Batched ray tracer of the toy world: images, object ids and depths.

Rendering is deterministic and view-independent, so that all views of a scene are consistent.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from wys_nerfstudio.demo.world import (
    BEAR_PARTS,
    BLOCK,
    DOME_RADIUS,
    EYE_DIRECTIONS,
    EYE_PATCH,
    GROUND,
    HAT_PARTS,
    HEAD,
    MATERIALS,
    OBJECTS,
    SKY,
    SUNGLASSES_PARTS,
    Camera,
    Scene,
)

SHADOW_OFFSET = 3e-3
EYE_PATCH_COSINE = 0.86

_BASE_ELLIPSOIDS = len(BEAR_PARTS) + 1
_OBJECT_OF_MATERIAL = tuple(
    OBJECTS.index(
        "hat"
        if name in ("brim", "crown")
        else "sunglasses"
        if "lens" in name or "temple" in name
        else name
        if name in OBJECTS
        else "bear"
    )
    for name in MATERIALS
)
# Layers: the scene without add-ons, and each add-on. Add-ons cast no shadow, so they change only the pixels they cover.
_LAYERS = (
    range(0, _BASE_ELLIPSOIDS),
    range(_BASE_ELLIPSOIDS, _BASE_ELLIPSOIDS + len(HAT_PARTS)),
    range(_BASE_ELLIPSOIDS + len(HAT_PARTS), _BASE_ELLIPSOIDS + len(HAT_PARTS) + len(SUNGLASSES_PARTS)),
)


@dataclass
class Hits:
    """Intersections of a batch of views before shading: n rays per view, one layer per set of objects."""

    origin: Float[Tensor, "b 1 3"]
    """Camera center."""
    direction: Float[Tensor, "b n 3"]
    """Ray directions, scaled to a component of 1 along the view axis, so that distances are depths."""
    depth: tuple[Float[Tensor, "b n"], ...]
    """Depth of the nearest hit per layer; infinity without a hit."""
    material: tuple[Int[Tensor, "b n"], ...]
    """Index into MATERIALS per layer."""
    normal: tuple[Float[Tensor, "b n 3"], ...]
    """Outward unit normal per layer."""
    lit: Float[Tensor, "b n"]
    """1 where the first layer's hit is lit, 0 in shadow."""


@dataclass
class Render:
    """Rendered views."""

    rgb: Float[Tensor, "b h w 3"]
    """Images in [0, 1]."""
    objects: Int[Tensor, "b h w"]
    """Index into OBJECTS of the object that most rays of a pixel hit."""
    depth: Float[Tensor, "b h w"]
    """Mean depth along the view axis of the rays that hit this object."""


def _turned(vector: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate vectors about the z axis; cosine and sine broadcast against the vector without its last axis."""
    x, y, z = vector.unbind(-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y, z], -1)


def _ellipsoids(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Return centers "b k 3", radii "b k 3" and yaws "b k" of all ellipsoids in the world frame, in the order of MATERIALS."""
    parts = torch.tensor([[c, r] for _, c, r in (*BEAR_PARTS, *HAT_PARTS, *SUNGLASSES_PARTS)])
    size = scene.bear_size[:, None, None]
    feet = torch.nn.functional.pad(scene.bear_position, (0, 1))[:, None]
    yaw = scene.bear_yaw[:, None].expand(-1, len(parts))
    center = _turned(parts[:, 0] * size, yaw.cos(), yaw.sin()) + feet
    radii = parts[:, 1] * size
    ball_radius = scene.ball_radius[:, None]
    ball_center = torch.cat([scene.ball_position, ball_radius], -1)[:, None]
    k = len(BEAR_PARTS)
    return (
        torch.cat([center[:, :k], ball_center, center[:, k:]], 1),
        torch.cat([radii[:, :k], ball_radius[..., None].expand(-1, 1, 3), radii[:, k:]], 1),
        torch.cat([yaw[:, :k], torch.zeros_like(ball_radius), yaw[:, k:]], 1),
    )


def _meet_ellipsoid(origin: Tensor, direction: Tensor, center: Tensor, radii: Tensor, yaw: Tensor) -> Tensor:
    """Return the distance "b n" along rays "b n 3" to the ellipsoids "b 3"; infinity where a ray misses."""
    cosine, sine = yaw.cos()[:, None], -yaw.sin()[:, None]
    o = _turned(origin - center[:, None], cosine, sine) / radii[:, None]
    d = _turned(direction, cosine, sine) / radii[:, None]
    a, half_b = (d * d).sum(-1), (o * d).sum(-1)
    discriminant = half_b * half_b - a * ((o * o).sum(-1) - 1)
    distance = (-half_b - discriminant.clamp_min(0).sqrt()) / a
    return torch.where((discriminant > 0) & (distance > 0), distance, torch.inf)


def _meet_block(scene: Scene, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance "b n" along rays "b n 3" to the block, and its outward normal "b n 3" at the hit."""
    cosine, sine = scene.block_yaw.cos()[:, None], scene.block_yaw.sin()[:, None]
    half = scene.block_half[:, None]
    middle = torch.cat([scene.block_position, scene.block_half[:, 2:]], -1)[:, None]
    o = _turned(origin - middle, cosine, -sine)
    d = _turned(direction, cosine, -sine)
    d = torch.where(d.abs() < 1e-9, 1e-9, d)
    near, far = (-half * d.sign() - o) / d, (half * d.sign() - o) / d
    entry, leave = near.amax(-1), far.amin(-1)
    inside = (entry < leave) & (entry > 0)
    normal = -(near == entry[..., None]).to(d) * d.sign()
    return torch.where(inside, entry, torch.inf), _turned(normal, cosine, sine)


def _rays(camera: Camera, samples: int) -> tuple[Tensor, Tensor]:
    """Return origin "b 1 3" and directions "b n 3" of samples x samples rays per pixel; rays of a pixel are contiguous."""
    step = (torch.arange(samples) + 0.5) / samples
    x = (torch.arange(camera.width)[None, :, None, None] + step).expand(camera.height, -1, samples, -1)
    y = (torch.arange(camera.height)[:, None, None, None] + step[:, None]).expand(-1, camera.width, -1, samples)
    focal = camera.focal[:, None]
    right = (x.reshape(1, -1) - camera.width / 2) / focal
    up = (camera.height / 2 - y.reshape(1, -1)) / focal
    local = torch.stack([right, up, -torch.ones_like(up)], -1)
    return camera.pose[:, None, :, 3], local @ camera.pose[:, :, :3].transpose(1, 2)


def trace(scene: Scene, camera: Camera, samples: int = 2) -> Hits:
    """Intersect the rays of one view per scene. The result is valid for all edits that do not change shapes, and both add-ons.

    Args:
        scene: Batch of b scenes.
        camera: Batch of b cameras, one per scene.
        samples: Rays per pixel and axis.

    Returns:
        Hits of n = height * width * samples ** 2 rays per view.
    """
    origin, direction = _rays(camera, samples)
    center, radii, yaw = _ellipsoids(scene)
    depth, material, normal = [], [], []
    for layer in _LAYERS:
        nearest = torch.full(direction.shape[:2], torch.inf)
        which = torch.full(direction.shape[:2], layer[0], dtype=torch.long)
        for k in layer:
            distance = _meet_ellipsoid(origin, direction, center[:, k], radii[:, k], yaw[:, k])
            which = torch.where(distance < nearest, k, which)
            nearest = torch.minimum(distance, nearest)
        chosen = which[..., None].expand(-1, -1, 3)
        turn = yaw.gather(1, which)
        position = origin + torch.where(nearest.isinf(), 1.0, nearest)[..., None] * direction
        local = _turned(position - center.gather(1, chosen), turn.cos(), -turn.sin()) / radii.gather(1, chosen)
        outward = torch.nn.functional.normalize(local / radii.gather(1, chosen), dim=-1)
        if layer is _LAYERS[0]:
            eyes = torch.nn.functional.normalize(torch.tensor(EYE_DIRECTIONS), dim=-1)
            cosine = (torch.nn.functional.normalize(local, dim=-1)[..., None, :] * eyes).sum(-1).amax(-1)
            which = torch.where((which == HEAD) & (cosine > EYE_PATCH_COSINE), EYE_PATCH, which)
        depth.append(nearest)
        material.append(which)
        normal.append(_turned(outward, turn.cos(), turn.sin()))

    block, block_normal = _meet_block(scene, origin, direction)
    falling = direction[..., 2] < 0
    ground = torch.where(falling, -origin[..., 2] / torch.where(falling, direction[..., 2], -1.0), torch.inf)
    a, half_b = (direction * direction).sum(-1), (origin * direction).sum(-1)
    dome = (-half_b + (half_b * half_b - a * ((origin * origin).sum(-1) - DOME_RADIUS**2)).sqrt()) / a
    upwards = torch.tensor([0.0, 0.0, 1.0])
    for distance, which, outward in (
        (block, BLOCK, block_normal),
        (ground, GROUND, upwards),
        (dome, SKY, upwards),
    ):
        closer = distance < depth[0]
        material[0] = torch.where(closer, which, material[0])
        normal[0] = torch.where(closer[..., None], outward, normal[0])
        depth[0] = torch.where(closer, distance, depth[0])

    start = origin + depth[0][..., None] * direction + SHADOW_OFFSET * normal[0]
    toward = scene.light_direction[:, None].expand_as(start)
    dark = _meet_block(scene, start, toward)[0].isfinite()
    for k in _LAYERS[0]:
        dark = dark | _meet_ellipsoid(start, toward, center[:, k], radii[:, k], yaw[:, k]).isfinite()
    return Hits(origin, direction, tuple(depth), tuple(material), tuple(normal), 1 - dark.to(start))


def _smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _ground_color(scene: Scene, position: Tensor) -> Tensor:
    """Return the color "b n 3" of the ground at positions "b n 3". Patterns fade with distance to avoid aliasing."""
    turn = -scene.ground_yaw[:, None]
    x, y, _ = (_turned(position, turn.cos(), turn.sin()) / scene.ground_scale[:, None, None]).unbind(-1)
    checker = torch.remainder(x.floor() + y.floor(), 2)
    wood = 0.5 + 0.35 * torch.sin(2 * math.pi * x + 0.6 * torch.sin(1.5 * y)) * torch.sin(0.9 * y + 2.4 * x.floor())
    kind = scene.ground_kind[:, None]
    pattern = torch.where(kind == 1, checker, torch.where(kind == 2, wood, torch.zeros_like(x)))
    pattern = 0.5 + (pattern - 0.5) * (1 - _smoothstep(position[..., :2].norm(dim=-1), 1.5, 3.5))
    return torch.lerp(scene.ground_colors[:, None, 0], scene.ground_colors[:, None, 1], pattern[..., None])


def shade(scene: Scene, hits: Hits) -> tuple[Float[Tensor, "b n 3"], Int[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Shade the hits of a trace.

    Args:
        scene: The traced scenes, possibly with other colors, lights, weather or add-ons, but the same shapes.
        hits: Hits of these scenes.

    Returns:
        Color in [0, 1], index into MATERIALS and depth of every ray.
    """
    depth, material, normal, lit = hits.depth[0], hits.material[0], hits.normal[0], hits.lit
    for worn, layer in ((scene.hat, 1), (scene.sunglasses, 2)):
        closer = worn[:, None] & (hits.depth[layer] < depth)
        depth = torch.where(closer, hits.depth[layer], depth)
        material = torch.where(closer, hits.material[layer], material)
        normal = torch.where(closer[..., None], hits.normal[layer], normal)
        lit = torch.where(closer, 1.0, lit)
    position = hits.origin + depth[..., None] * hits.direction
    color = scene.colors.gather(1, material[..., None].expand(-1, -1, 3))
    color = torch.where((material == GROUND)[..., None], _ground_color(scene, position), color)
    cover = scene.snow[:, None] * _smoothstep(normal[..., 2], 0.35, 0.65)
    color = torch.lerp(color, torch.tensor([0.94, 0.95, 0.98]).expand_as(color), cover[..., None])
    direct = (normal * scene.light_direction[:, None]).sum(-1).clamp_min(0) * lit
    color = color * (scene.ambient[:, None] + scene.light_color[:, None] * direct[..., None])
    height = _smoothstep(position[..., 2], 0.0, DOME_RADIUS)[..., None]
    sky = torch.lerp(scene.sky_colors[:, None, 0], scene.sky_colors[:, None, 1], height)
    return torch.where((material == SKY)[..., None], sky, color).clamp(0, 1), material, depth


def render(scene: Scene, camera: Camera, samples: int = 2) -> Render:
    """Render one view per scene.

    Args:
        scene: Batch of b scenes.
        camera: Batch of b cameras.
        samples: Rays per pixel and axis.
    """
    color, material, depth = shade(scene, trace(scene, camera, samples))
    size = (len(scene), camera.height, camera.width)
    rays = torch.tensor(_OBJECT_OF_MATERIAL)[material].view(*size, -1)
    objects = rays.mode(-1).values
    same = (rays == objects[..., None]).to(depth)
    return Render(
        rgb=color.view(*size, -1, 3).mean(-2),
        objects=objects,
        depth=(depth.view(*size, -1) * same).sum(-1) / same.sum(-1),
    )


def to_bytes(rgb: Float[Tensor, "*shape 3"]) -> UInt8[Tensor, "*shape 3"]:
    """Convert images in [0, 1] to 8 bits per channel."""
    return (rgb * 255).round().clamp(0, 255).to(torch.uint8)
