"""Toy world: a bear, a ball and a block on the ground under a dome; scenes and cameras are sampled from seeds.

World frame: z up, ground at z = 0, unit of length about the height of the bear. Cameras follow the OpenGL convention: x right,
y up, viewing direction -z.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TRAIN_SEEDS = range(0, 1_000_000)
VALIDATION_SEEDS = range(1_000_000, 2_000_000)
TEST_SEEDS = range(2_000_000, 3_000_000)
DEMO_SEEDS = range(3_000_000, 4_000_000)

OBJECTS = ("sky", "ground", "bear", "ball", "block", "hat", "sunglasses")
DOME_RADIUS = 5.0

# Name, center and radii in the bear's frame: facing +x, standing on z = 0.
BEAR_PARTS = (
    ("body", (0.0, 0.0, 0.40), (0.27, 0.30, 0.33)),
    ("head", (0.04, 0.0, 0.86), (0.27, 0.29, 0.26)),
    ("left ear", (0.0, 0.22, 1.08), (0.07, 0.11, 0.11)),
    ("right ear", (0.0, -0.22, 1.08), (0.07, 0.11, 0.11)),
    ("snout", (0.29, 0.0, 0.79), (0.13, 0.13, 0.10)),
    ("nose", (0.41, 0.0, 0.82), (0.045, 0.055, 0.04)),
    ("left eye", (0.27, 0.11, 0.92), (0.04, 0.045, 0.045)),
    ("right eye", (0.27, -0.11, 0.92), (0.04, 0.045, 0.045)),
    ("left arm", (0.12, 0.31, 0.50), (0.19, 0.12, 0.13)),
    ("right arm", (0.12, -0.31, 0.50), (0.19, 0.12, 0.13)),
    ("left leg", (0.22, 0.20, 0.13), (0.24, 0.14, 0.13)),
    ("right leg", (0.22, -0.20, 0.13), (0.24, 0.14, 0.13)),
)
HAT_PARTS = (
    ("brim", (0.03, 0.0, 1.07), (0.33, 0.33, 0.055)),
    ("crown", (0.03, 0.0, 1.18), (0.21, 0.21, 0.25)),
)
SUNGLASSES_PARTS = (
    ("left lens", (0.30, 0.135, 0.92), (0.055, 0.145, 0.11)),
    ("right lens", (0.30, -0.135, 0.92), (0.055, 0.145, 0.11)),
    ("left temple", (0.15, 0.285, 0.94), (0.20, 0.035, 0.04)),
    ("right temple", (0.15, -0.285, 0.94), (0.20, 0.035, 0.04)),
)
EYE_DIRECTIONS = ((0.80, 0.42, 0.30), (0.80, -0.42, 0.30))
"""Directions of the panda's eye patches from the center of the head; other bears have fur there."""

MATERIALS = (
    *(name for name, _, _ in BEAR_PARTS),
    "ball",
    *(name for name, _, _ in HAT_PARTS),
    *(name for name, _, _ in SUNGLASSES_PARTS),
    "block",
    "eye patch",
    "ground",
    "sky",
)
"""Materials that a ray can hit. The ellipsoids come first, in the order of the tracer."""
BLOCK, EYE_PATCH, GROUND, SKY = (MATERIALS.index(name) for name in ("block", "eye patch", "ground", "sky"))
HEAD = MATERIALS.index("head")

RED, BLUE, GREEN, YELLOW = (0.85, 0.10, 0.10), (0.10, 0.22, 0.85), (0.10, 0.62, 0.16), (0.95, 0.82, 0.08)
NAMED_COLORS = {"red": RED, "blue": BLUE, "green": GREEN, "yellow": YELLOW}
TOY_COLORS = (
    (0.92, 0.50, 0.12),
    (0.50, 0.18, 0.62),
    (0.92, 0.55, 0.68),
    (0.90, 0.90, 0.90),
    (0.45, 0.45, 0.47),
    (0.18, 0.68, 0.72),
    (0.42, 0.26, 0.14),
    (0.16, 0.16, 0.18),
)
"""Original colors of ball and block: far from every named color, so that every recoloring is visible."""
HAT_COLOR = (0.48, 0.10, 0.55)
DARK = (0.05, 0.05, 0.06)


@dataclass
class Scene:
    """A batch of toy scenes (first axis of every tensor: the scene)."""

    bear_position: Float[Tensor, "b 2"]
    """Position of the bear on the ground."""
    bear_yaw: Float[Tensor, "b"]
    """Direction the bear faces, in radians from +x."""
    bear_size: Float[Tensor, "b"]
    """Scale of the bear, about 1."""
    ball_position: Float[Tensor, "b 2"]
    """Contact point of the ball with the ground."""
    ball_radius: Float[Tensor, "b"]
    """Radius of the ball."""
    block_position: Float[Tensor, "b 2"]
    """Center of the block on the ground."""
    block_yaw: Float[Tensor, "b"]
    """Rotation of the block in radians."""
    block_half: Float[Tensor, "b 3"]
    """Half extents of the block."""
    colors: Float[Tensor, "b materials 3"]
    """Color of every material in [0, 1]; the entries of ground and sky are unused."""
    hat: Bool[Tensor, "b"]
    """Whether the bear wears a hat."""
    sunglasses: Bool[Tensor, "b"]
    """Whether the bear wears sunglasses."""
    ground_kind: Int[Tensor, "b"]
    """Pattern of the ground: 0 plain, 1 checkerboard, 2 wood."""
    ground_colors: Float[Tensor, "b 2 3"]
    """Both colors of the pattern."""
    ground_yaw: Float[Tensor, "b"]
    """Direction of the pattern in radians."""
    ground_scale: Float[Tensor, "b"]
    """Width of a tile or plank."""
    sky_colors: Float[Tensor, "b 2 3"]
    """Colors of the dome at the horizon and at the zenith."""
    light_direction: Float[Tensor, "b 3"]
    """Unit vector toward the light."""
    light_color: Float[Tensor, "b 3"]
    """Intensity of the direct light."""
    ambient: Float[Tensor, "b 3"]
    """Intensity of the ambient light."""
    snow: Bool[Tensor, "b"]
    """Whether upward-facing surfaces are covered with snow."""

    def __len__(self) -> int:
        return len(self.bear_yaw)

    def __getitem__(self, index: slice | list[int]) -> "Scene":
        """Select scenes; the result is a batch."""
        return Scene(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def repeat(self, times: int) -> "Scene":
        """Repeat each scene `times` times consecutively."""
        return Scene(**{field.name: getattr(self, field.name).repeat_interleave(times, 0) for field in fields(self)})

    def center(self) -> Float[Tensor, "b 3"]:
        """Return the centroid of the three objects at half the bear's height."""
        middle = (self.bear_position + self.ball_position + self.block_position) / 3
        return torch.cat([middle, torch.full_like(middle[:, :1], 0.45)], -1)


def concatenate(scenes: Sequence[Scene]) -> Scene:
    """Concatenate batches of scenes."""
    return Scene(**{field.name: torch.cat([getattr(s, field.name) for s in scenes]) for field in fields(Scene)})


@dataclass
class Camera:
    """A batch of pinhole cameras with one image size."""

    pose: Float[Tensor, "b 3 4"]
    """Camera-to-world matrices, OpenGL axes."""
    focal: Float[Tensor, "b"]
    """Focal length in pixels."""
    width: int
    """Image width in pixels."""
    height: int
    """Image height in pixels."""


def _uniforms(seeds: Sequence[int], count: int) -> Float[Tensor, "b count"]:
    """Return `count` uniform samples in [0, 1) per seed, independent of the other seeds in the batch."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample_scenes(seeds: Sequence[int]) -> Scene:
    """Sample one scene per seed, without hat, sunglasses and snow.

    Args:
        seeds: One integer per scene; the splits are TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS and DEMO_SEEDS.
    """
    u = _uniforms(seeds, 64)
    b = len(u)

    def between(column: int, low: float, high: float) -> Tensor:
        return low + (high - low) * u[:, column]

    def color(column: int, spread: float) -> Tensor:
        return (u[:, column : column + 3] - 0.5) * 2 * spread

    bear_position = torch.stack([between(0, -0.25, 0.25), between(1, -0.25, 0.25)], -1)
    angle = between(2, 0.0, 2 * math.pi)
    other = angle + between(3, math.radians(75.0), math.radians(285.0))

    def beside(turn: Tensor, distance: Tensor) -> Tensor:
        return bear_position + distance[:, None] * torch.stack([turn.cos(), turn.sin()], -1)

    fur = torch.tensor([0.48, 0.31, 0.17]) * between(10, 0.7, 1.35)[:, None] + color(11, 0.05)
    muzzle = fur * 0.45 + torch.tensor([0.85, 0.72, 0.55]) * 0.55
    colors = fur[:, None].expand(b, len(MATERIALS), 3).clone()
    colors[:, MATERIALS.index("snout")] = muzzle
    for name in ("nose", "left eye", "right eye", "left lens", "right lens", "left temple", "right temple"):
        colors[:, MATERIALS.index(name)] = torch.tensor(DARK)
    for name in ("brim", "crown"):
        colors[:, MATERIALS.index(name)] = torch.tensor(HAT_COLOR)
    toys = torch.tensor(TOY_COLORS)
    first = (u[:, 14] * len(toys)).long()
    second = (first + 1 + (u[:, 15] * (len(toys) - 1)).long()) % len(toys)
    colors[:, MATERIALS.index("ball")] = toys[first] + color(16, 0.04)
    colors[:, BLOCK] = toys[second] + color(19, 0.04)

    wood = torch.tensor([0.62, 0.46, 0.30]) * between(22, 0.75, 1.25)[:, None] + color(23, 0.06)
    plain = torch.tensor([0.55, 0.55, 0.52]) + color(26, 0.22)
    kind = (u[:, 29] * 3).long()
    ground = torch.where((kind == 2)[:, None], wood, plain)
    contrast = torch.where(kind == 0, torch.zeros(b), between(30, 0.68, 0.85))
    darker = torch.where((kind == 0)[:, None], ground, ground * contrast[:, None])
    outdoors = (u[:, 31] < 0.5)[:, None]
    horizon = torch.where(outdoors, torch.tensor([0.75, 0.83, 0.90]), torch.tensor([0.70, 0.66, 0.60])) + color(
        32, 0.12
    )
    zenith = torch.where(outdoors, torch.tensor([0.35, 0.55, 0.85]), horizon + 0.05) + color(35, 0.06)

    azimuth, elevation = between(38, 0.0, 2 * math.pi), between(39, math.radians(45), math.radians(70))
    light = torch.stack([azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], -1)
    half = torch.stack([between(6, 0.20, 0.29), between(7, 0.20, 0.29), between(8, 0.20, 0.32)], -1)
    none = torch.zeros(b, dtype=torch.bool)
    return Scene(
        bear_position=bear_position,
        bear_yaw=between(4, 0.0, 2 * math.pi),
        bear_size=between(5, 0.95, 1.1),
        ball_position=beside(angle, between(9, 0.88, 1.05)),
        ball_radius=between(40, 0.26, 0.36),
        block_position=beside(other, between(41, 0.88, 1.05)),
        block_yaw=between(42, 0.0, 2 * math.pi),
        block_half=half,
        colors=colors.clamp(0.02, 0.98),
        hat=none,
        sunglasses=none.clone(),
        ground_kind=kind,
        ground_colors=torch.stack([ground, darker], 1).clamp(0.05, 0.95),
        ground_yaw=between(43, 0.0, 2 * math.pi),
        ground_scale=between(44, 0.30, 0.55),
        sky_colors=torch.stack([horizon, zenith], 1).clamp(0.05, 0.98),
        light_direction=light,
        light_color=between(45, 0.55, 0.70)[:, None] * torch.tensor([1.0, 0.97, 0.92]),
        ambient=between(46, 0.48, 0.60)[:, None] * torch.tensor([0.96, 0.98, 1.0]),
        snow=none.clone(),
    )


def look_at(
    position: Float[Tensor, "b 3"],
    target: Float[Tensor, "b 3"],
    field_of_view: Float[Tensor, "b"],
    width: int,
    height: int,
) -> Camera:
    """Return upright cameras at `position` that look at `target`.

    Args:
        position: Camera centers.
        target: Points projected to the image center.
        field_of_view: Field of view along the image's shorter side in radians.
        width: Image width in pixels.
        height: Image height in pixels.
    """
    back = torch.nn.functional.normalize(position - target, dim=-1)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]).expand_as(back), back), dim=-1
    )
    pose = torch.stack([right, torch.linalg.cross(back, right), back, position], -1)
    return Camera(pose, 0.5 * min(width, height) / (field_of_view / 2).tan(), width, height)


def sample_cameras(scene: Scene, seeds: Sequence[int], width: int, height: int) -> Camera:
    """Sample one camera per scene: any azimuth, elevations of the demo scene, aimed near the center of the scene.

    Args:
        scene: The scenes.
        seeds: One integer per scene.
        width: Image width in pixels.
        height: Image height in pixels.
    """
    u = _uniforms([seed + 10_000_000 for seed in seeds], 8)
    azimuth, elevation = u[:, 0] * 2 * math.pi, torch.deg2rad(12 + 38 * u[:, 1])
    distance = 2.6 + 0.7 * u[:, 2]
    offset = torch.stack([azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], -1)
    # Random target, so that an editor cannot learn the position of the bear in the image.
    target = scene.center() + (u[:, 3:6] - 0.5) * torch.tensor([0.7, 0.7, 0.3])
    return look_at(target + distance[:, None] * offset, target, torch.deg2rad(42 + 8 * u[:, 6]), width, height)


def with_colors(scene: Scene, colors: dict[str, tuple[float, float, float]]) -> Scene:
    """Return the scenes with new colors of some materials."""
    table = scene.colors.clone()
    for name, color in colors.items():
        table[:, MATERIALS.index(name)] = torch.tensor(color)
    return replace(scene, colors=table)
