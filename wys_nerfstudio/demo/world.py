"""The toy world: a bear, a ball and a block on the ground of a dome, ray traced exactly in batches.

Here: what a scene and a camera are, how both are drawn from a seed, and how they become pictures, object ids and depths.
Not here: what an instruction does to a scene (`instructions.py`) and how views become a data set (`scene.py`).

World frame: z up, ground at z = 0, lengths in bear heights more or less. Cameras follow OpenGL: x right, y up, looking
along -z. A scene's pictures depend on nothing but the scene and the camera, so all views of one scene agree exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

TRAIN_SEEDS = range(0, 1_000_000)
VALIDATION_SEEDS = range(1_000_000, 2_000_000)
TEST_SEEDS = range(2_000_000, 3_000_000)
DEMO_SEEDS = range(3_000_000, 4_000_000)

OBJECTS = ("sky", "ground", "bear", "ball", "block", "hat", "sunglasses")
DOME_RADIUS = 5.0
SHADOW_OFFSET = 3e-3
EYE_PATCH_COSINE = 0.86

# Name, centre and radii in the bear's own frame: it looks along +x and stands on z = 0.
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
"""Where on the unit sphere the head's eye patches sit (a panda's; other bears have fur there)."""

_BASE_ELLIPSOIDS = len(BEAR_PARTS) + 1
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
"""What a ray can hit. The ellipsoids come first, in the order in which the tracer lists them."""
BLOCK, EYE_PATCH, GROUND, SKY = (MATERIALS.index(name) for name in ("block", "eye patch", "ground", "sky"))
HEAD = MATERIALS.index("head")
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
# Layers: the bare scene, and each add-on alone. An add-on casts no shadow, so it changes only the pixels that it covers.
_LAYERS = (
    range(0, _BASE_ELLIPSOIDS),
    range(_BASE_ELLIPSOIDS, _BASE_ELLIPSOIDS + len(HAT_PARTS)),
    range(_BASE_ELLIPSOIDS + len(HAT_PARTS), _BASE_ELLIPSOIDS + len(HAT_PARTS) + len(SUNGLASSES_PARTS)),
)

RED, BLUE, GREEN, YELLOW = (0.85, 0.10, 0.10), (0.10, 0.22, 0.85), (0.10, 0.62, 0.16), (0.95, 0.82, 0.08)
NAMED_COLOURS = {"red": RED, "blue": BLUE, "green": GREEN, "yellow": YELLOW}
TOY_COLOURS = (
    (0.92, 0.50, 0.12),
    (0.50, 0.18, 0.62),
    (0.92, 0.55, 0.68),
    (0.90, 0.90, 0.90),
    (0.45, 0.45, 0.47),
    (0.18, 0.68, 0.72),
    (0.42, 0.26, 0.14),
    (0.16, 0.16, 0.18),
)
"""What ball and block are made in: far from every named colour, so that a recolouring always shows."""
HAT_COLOUR = (0.48, 0.10, 0.55)
DARK = (0.05, 0.05, 0.06)


@dataclass
class Scene:
    """A batch of toy scenes (first axis of every tensor: the scene)."""

    bear_position: Float[Tensor, "b 2"]
    """Where the bear stands."""
    bear_yaw: Float[Tensor, "b"]
    """Where it looks, in radians from +x."""
    bear_size: Float[Tensor, "b"]
    """Its scale, about 1."""
    ball_position: Float[Tensor, "b 2"]
    """Where the ball touches the ground."""
    ball_radius: Float[Tensor, "b"]
    """Its radius."""
    block_position: Float[Tensor, "b 2"]
    """Where the block's centre is."""
    block_yaw: Float[Tensor, "b"]
    """Its turn in radians."""
    block_half: Float[Tensor, "b 3"]
    """Its half extents."""
    colours: Float[Tensor, "b materials 3"]
    """Colour of every material in [0, 1]; the entries of ground and sky are unused."""
    hat: Bool[Tensor, "b"]
    """Whether the bear wears a hat."""
    sunglasses: Bool[Tensor, "b"]
    """Whether it wears sunglasses."""
    ground_kind: Int[Tensor, "b"]
    """0 plain, 1 checker, 2 wood."""
    ground_colours: Float[Tensor, "b 2 3"]
    """The pattern's two colours."""
    ground_yaw: Float[Tensor, "b"]
    """The pattern's direction in radians."""
    ground_scale: Float[Tensor, "b"]
    """Width of a tile or plank."""
    sky_colours: Float[Tensor, "b 2 3"]
    """The dome's colours at the ground and at the top."""
    light_direction: Float[Tensor, "b 3"]
    """Unit vector towards the light."""
    light_colour: Float[Tensor, "b 3"]
    """Brightness of the direct light."""
    ambient: Float[Tensor, "b 3"]
    """Brightness of the light that comes from everywhere."""
    snow: Bool[Tensor, "b"]
    """Whether snow lies on whatever faces upwards."""

    def __len__(self) -> int:
        return len(self.bear_yaw)

    def __getitem__(self, index: slice | list[int]) -> "Scene":
        """The scenes at `index`, still as a batch."""
        return Scene(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def repeat(self, times: int) -> "Scene":
        """Every scene `times` times in a row."""
        return Scene(**{field.name: getattr(self, field.name).repeat_interleave(times, 0) for field in fields(self)})

    def centre(self) -> Float[Tensor, "b 3"]:
        """The middle of the three objects, at half the bear's height."""
        middle = (self.bear_position + self.ball_position + self.block_position) / 3
        return torch.cat([middle, torch.full_like(middle[:, :1], 0.45)], -1)


def concatenate(scenes: Sequence[Scene]) -> Scene:
    """One batch out of several."""
    return Scene(**{field.name: torch.cat([getattr(s, field.name) for s in scenes]) for field in fields(Scene)})


@dataclass
class Camera:
    """A batch of pinhole cameras of one picture size."""

    pose: Float[Tensor, "b 3 4"]
    """Camera to world, OpenGL axes."""
    focal: Float[Tensor, "b"]
    """Focal length in pixels."""
    width: int
    """Picture width in pixels."""
    height: int
    """Picture height in pixels."""


@dataclass
class Hits:
    """What the rays of a batch of views meet, before any colour: n rays per view, one layer per set of objects."""

    origin: Float[Tensor, "b 1 3"]
    """Camera centre."""
    direction: Float[Tensor, "b n 3"]
    """Ray directions; their component along the view axis is 1, so that distances are depths."""
    depth: tuple[Float[Tensor, "b n"], ...]
    """Depth of the nearest hit per layer, infinite where there is none."""
    material: tuple[Int[Tensor, "b n"], ...]
    """Index into MATERIALS per layer."""
    normal: tuple[Float[Tensor, "b n 3"], ...]
    """Outward unit normal per layer."""
    lit: Float[Tensor, "b n"]
    """1 where the light reaches the bare scene's hit, 0 in shadow."""


@dataclass
class Render:
    """Finished views."""

    rgb: Float[Tensor, "b h w 3"]
    """Pictures in [0, 1]."""
    objects: Int[Tensor, "b h w"]
    """Index into OBJECTS: what most of a pixel's rays meet."""
    depth: Float[Tensor, "b h w"]
    """Mean depth along the view axis of the rays that meet that object."""


def _uniforms(seeds: Sequence[int], count: int) -> Float[Tensor, "b count"]:
    """`count` numbers in [0, 1) per seed, the same whatever the batch."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample_scenes(seeds: Sequence[int]) -> Scene:
    """Draws one scene per seed. The bear has neither hat nor sunglasses, and no snow lies.

    Args:
        seeds: one integer per scene; see TRAIN_SEEDS and its siblings for who may use which.

    Returns:
        The scenes as one batch.
    """
    u = _uniforms(seeds, 64)
    b = len(u)

    def between(column: int, low: float, high: float) -> Tensor:
        return low + (high - low) * u[:, column]

    def colour(column: int, spread: float) -> Tensor:
        return (u[:, column : column + 3] - 0.5) * 2 * spread

    bear_position = torch.stack([between(0, -0.25, 0.25), between(1, -0.25, 0.25)], -1)
    angle = between(2, 0.0, 2 * math.pi)
    other = angle + between(3, math.radians(75.0), math.radians(285.0))

    def beside(turn: Tensor, distance: Tensor) -> Tensor:
        return bear_position + distance[:, None] * torch.stack([turn.cos(), turn.sin()], -1)

    fur = torch.tensor([0.48, 0.31, 0.17]) * between(10, 0.7, 1.35)[:, None] + colour(11, 0.05)
    muzzle = fur * 0.45 + torch.tensor([0.85, 0.72, 0.55]) * 0.55
    colours = fur[:, None].expand(b, len(MATERIALS), 3).clone()
    colours[:, MATERIALS.index("snout")] = muzzle
    for name in ("nose", "left eye", "right eye", "left lens", "right lens", "left temple", "right temple"):
        colours[:, MATERIALS.index(name)] = torch.tensor(DARK)
    for name in ("brim", "crown"):
        colours[:, MATERIALS.index(name)] = torch.tensor(HAT_COLOUR)
    toys = torch.tensor(TOY_COLOURS)
    first = (u[:, 14] * len(toys)).long()
    second = (first + 1 + (u[:, 15] * (len(toys) - 1)).long()) % len(toys)
    colours[:, MATERIALS.index("ball")] = toys[first] + colour(16, 0.04)
    colours[:, BLOCK] = toys[second] + colour(19, 0.04)

    wood = torch.tensor([0.62, 0.46, 0.30]) * between(22, 0.75, 1.25)[:, None] + colour(23, 0.06)
    plain = torch.tensor([0.55, 0.55, 0.52]) + colour(26, 0.22)
    kind = (u[:, 29] * 3).long()
    ground = torch.where((kind == 2)[:, None], wood, plain)
    contrast = torch.where(kind == 0, torch.zeros(b), between(30, 0.68, 0.85))
    darker = torch.where((kind == 0)[:, None], ground, ground * contrast[:, None])
    outdoors = (u[:, 31] < 0.5)[:, None]
    horizon = torch.where(outdoors, torch.tensor([0.75, 0.83, 0.90]), torch.tensor([0.70, 0.66, 0.60])) + colour(
        32, 0.12
    )
    zenith = torch.where(outdoors, torch.tensor([0.35, 0.55, 0.85]), horizon + 0.05) + colour(35, 0.06)

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
        colours=colours.clamp(0.02, 0.98),
        hat=none,
        sunglasses=none.clone(),
        ground_kind=kind,
        ground_colours=torch.stack([ground, darker], 1).clamp(0.05, 0.95),
        ground_yaw=between(43, 0.0, 2 * math.pi),
        ground_scale=between(44, 0.30, 0.55),
        sky_colours=torch.stack([horizon, zenith], 1).clamp(0.05, 0.98),
        light_direction=light,
        light_colour=between(45, 0.55, 0.70)[:, None] * torch.tensor([1.0, 0.97, 0.92]),
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
    """Upright cameras at `position` that look at `target`.

    Args:
        position: camera centres.
        target: what appears in the middle of the picture.
        field_of_view: opening angle of the picture's shorter side in radians.
        width: picture width in pixels.
        height: picture height in pixels.

    Returns:
        The cameras.
    """
    back = torch.nn.functional.normalize(position - target, dim=-1)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]).expand_as(back), back), dim=-1
    )
    pose = torch.stack([right, torch.linalg.cross(back, right), back, position], -1)
    return Camera(pose, 0.5 * min(width, height) / (field_of_view / 2).tan(), width, height)


def sample_cameras(scene: Scene, seeds: Sequence[int], width: int, height: int) -> Camera:
    """Draws one camera per scene: from any side, at the demo scene's elevations, not aimed exactly at the middle.

    Args:
        scene: the scenes to look at.
        seeds: one integer per scene.
        width: picture width in pixels.
        height: picture height in pixels.

    Returns:
        The cameras.
    """
    u = _uniforms([seed + 10_000_000 for seed in seeds], 8)
    azimuth, elevation = u[:, 0] * 2 * math.pi, torch.deg2rad(12 + 38 * u[:, 1])
    distance = 2.6 + 0.7 * u[:, 2]
    offset = torch.stack([azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], -1)
    # The aim wanders, so that an editor cannot learn where in the picture the bear stands.
    target = scene.centre() + (u[:, 3:6] - 0.5) * torch.tensor([0.7, 0.7, 0.3])
    return look_at(target + distance[:, None] * offset, target, torch.deg2rad(42 + 8 * u[:, 6]), width, height)


def _turned(vector: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns xyz about the z axis; cosine and sine broadcast against the vector without its last axis."""
    x, y, z = vector.unbind(-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y, z], -1)


def _ellipsoids(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Centres "b k 3", radii "b k 3" and yaws "b k" of all ellipsoids in the world, in the order of MATERIALS."""
    parts = torch.tensor([[c, r] for _, c, r in (*BEAR_PARTS, *HAT_PARTS, *SUNGLASSES_PARTS)])
    size = scene.bear_size[:, None, None]
    feet = torch.nn.functional.pad(scene.bear_position, (0, 1))[:, None]
    yaw = scene.bear_yaw[:, None].expand(-1, len(parts))
    centre = _turned(parts[:, 0] * size, yaw.cos(), yaw.sin()) + feet
    radii = parts[:, 1] * size
    ball_radius = scene.ball_radius[:, None]
    ball_centre = torch.cat([scene.ball_position, ball_radius], -1)[:, None]
    k = len(BEAR_PARTS)
    return (
        torch.cat([centre[:, :k], ball_centre, centre[:, k:]], 1),
        torch.cat([radii[:, :k], ball_radius[..., None].expand(-1, 1, 3), radii[:, k:]], 1),
        torch.cat([yaw[:, :k], torch.zeros_like(ball_radius), yaw[:, k:]], 1),
    )


def _meet_ellipsoid(origin: Tensor, direction: Tensor, centre: Tensor, radii: Tensor, yaw: Tensor) -> Tensor:
    """Distance "b n" to the ellipsoids "b 3" along rays "b n 3"; infinite where they pass by or lie behind."""
    cosine, sine = yaw.cos()[:, None], -yaw.sin()[:, None]
    o = _turned(origin - centre[:, None], cosine, sine) / radii[:, None]
    d = _turned(direction, cosine, sine) / radii[:, None]
    a, half_b = (d * d).sum(-1), (o * d).sum(-1)
    discriminant = half_b * half_b - a * ((o * o).sum(-1) - 1)
    distance = (-half_b - discriminant.clamp_min(0).sqrt()) / a
    return torch.where((discriminant > 0) & (distance > 0), distance, torch.inf)


def _meet_block(scene: Scene, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Distance "b n" to the block along rays "b n 3", and its outward normal "b n 3" there."""
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
    """Origin "b 1 3" and directions "b n 3" of samples x samples rays per pixel, the rays of one pixel in a row."""
    step = (torch.arange(samples) + 0.5) / samples
    x = (torch.arange(camera.width)[None, :, None, None] + step).expand(camera.height, -1, samples, -1)
    y = (torch.arange(camera.height)[:, None, None, None] + step[:, None]).expand(-1, camera.width, -1, samples)
    focal = camera.focal[:, None]
    right = (x.reshape(1, -1) - camera.width / 2) / focal
    up = (camera.height / 2 - y.reshape(1, -1)) / focal
    local = torch.stack([right, up, -torch.ones_like(up)], -1)
    return camera.pose[:, None, :, 3], local @ camera.pose[:, :, :3].transpose(1, 2)


def trace(scene: Scene, camera: Camera, samples: int = 2) -> Hits:
    """Finds what every ray meets. One trace serves all edits that keep shapes, and both add-ons.

    Args:
        scene: b scenes.
        camera: b cameras, the i-th for the i-th scene.
        samples: rays per pixel and axis.

    Returns:
        The hits of n = height * width * samples ** 2 rays per view.
    """
    origin, direction = _rays(camera, samples)
    centre, radii, yaw = _ellipsoids(scene)
    depth, material, normal = [], [], []
    for layer in _LAYERS:
        nearest = torch.full(direction.shape[:2], torch.inf)
        which = torch.full(direction.shape[:2], layer[0], dtype=torch.long)
        for k in layer:
            distance = _meet_ellipsoid(origin, direction, centre[:, k], radii[:, k], yaw[:, k])
            which = torch.where(distance < nearest, k, which)
            nearest = torch.minimum(distance, nearest)
        chosen = which[..., None].expand(-1, -1, 3)
        turn = yaw.gather(1, which)
        position = origin + torch.where(nearest.isinf(), 1.0, nearest)[..., None] * direction
        local = _turned(position - centre.gather(1, chosen), turn.cos(), -turn.sin()) / radii.gather(1, chosen)
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
    towards = scene.light_direction[:, None].expand_as(start)
    dark = _meet_block(scene, start, towards)[0].isfinite()
    for k in _LAYERS[0]:
        dark = dark | _meet_ellipsoid(start, towards, centre[:, k], radii[:, k], yaw[:, k]).isfinite()
    return Hits(origin, direction, tuple(depth), tuple(material), tuple(normal), 1 - dark.to(start))


def _smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _ground_colour(scene: Scene, position: Tensor) -> Tensor:
    """The ground's colour "b n 3" at positions "b n 3". Patterns fade with distance, where they would only alias."""
    turn = -scene.ground_yaw[:, None]
    x, y, _ = (_turned(position, turn.cos(), turn.sin()) / scene.ground_scale[:, None, None]).unbind(-1)
    checker = torch.remainder(x.floor() + y.floor(), 2)
    wood = 0.5 + 0.35 * torch.sin(2 * math.pi * x + 0.6 * torch.sin(1.5 * y)) * torch.sin(0.9 * y + 2.4 * x.floor())
    kind = scene.ground_kind[:, None]
    pattern = torch.where(kind == 1, checker, torch.where(kind == 2, wood, torch.zeros_like(x)))
    pattern = 0.5 + (pattern - 0.5) * (1 - _smoothstep(position[..., :2].norm(dim=-1), 1.5, 3.5))
    return torch.lerp(scene.ground_colours[:, None, 0], scene.ground_colours[:, None, 1], pattern[..., None])


def shade(scene: Scene, hits: Hits) -> tuple[Float[Tensor, "b n 3"], Int[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Colours what a trace has found.

    Args:
        scene: the traced scenes, or the same with other colours, lights, weather or add-ons (not other shapes).
        hits: their trace.

    Returns:
        Colour in [0, 1], index into MATERIALS and depth of every ray.
    """
    depth, material, normal, lit = hits.depth[0], hits.material[0], hits.normal[0], hits.lit
    for worn, layer in ((scene.hat, 1), (scene.sunglasses, 2)):
        closer = worn[:, None] & (hits.depth[layer] < depth)
        depth = torch.where(closer, hits.depth[layer], depth)
        material = torch.where(closer, hits.material[layer], material)
        normal = torch.where(closer[..., None], hits.normal[layer], normal)
        lit = torch.where(closer, 1.0, lit)
    position = hits.origin + depth[..., None] * hits.direction
    colour = scene.colours.gather(1, material[..., None].expand(-1, -1, 3))
    colour = torch.where((material == GROUND)[..., None], _ground_colour(scene, position), colour)
    cover = scene.snow[:, None] * _smoothstep(normal[..., 2], 0.35, 0.65)
    colour = torch.lerp(colour, torch.tensor([0.94, 0.95, 0.98]).expand_as(colour), cover[..., None])
    direct = (normal * scene.light_direction[:, None]).sum(-1).clamp_min(0) * lit
    colour = colour * (scene.ambient[:, None] + scene.light_colour[:, None] * direct[..., None])
    height = _smoothstep(position[..., 2], 0.0, DOME_RADIUS)[..., None]
    sky = torch.lerp(scene.sky_colours[:, None, 0], scene.sky_colours[:, None, 1], height)
    return torch.where((material == SKY)[..., None], sky, colour).clamp(0, 1), material, depth


def render(scene: Scene, camera: Camera, samples: int = 2) -> Render:
    """Renders one view per scene.

    Args:
        scene: b scenes.
        camera: b cameras.
        samples: rays per pixel and axis.

    Returns:
        Pictures, object ids and depths.
    """
    colour, material, depth = shade(scene, trace(scene, camera, samples))
    size = (len(scene), camera.height, camera.width)
    rays = torch.tensor(_OBJECT_OF_MATERIAL)[material].view(*size, -1)
    objects = rays.mode(-1).values
    same = (rays == objects[..., None]).to(depth)
    return Render(
        rgb=colour.view(*size, -1, 3).mean(-2),
        objects=objects,
        depth=(depth.view(*size, -1) * same).sum(-1) / same.sum(-1),
    )


def to_bytes(rgb: Float[Tensor, "*shape 3"]) -> UInt8[Tensor, "*shape 3"]:
    """Pictures in [0, 1] as 8 bits per channel, as they are stored."""
    return (rgb * 255).round().clamp(0, 255).to(torch.uint8)


def with_colours(scene: Scene, colours: dict[str, tuple[float, float, float]]) -> Scene:
    """The same scenes with some materials in other colours."""
    table = scene.colours.clone()
    for name, colour in colours.items():
        table[:, MATERIALS.index(name)] = torch.tensor(colour)
    return replace(scene, colours=table)
