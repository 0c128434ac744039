"""Edits of the toy world: instructions, captions and the change of the scene that each edit makes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from wys_nerfstudio.demo.world import BEAR_PARTS, NAMED_COLORS, Scene, with_colors

CAPTION = "a photo of a toy bear, a ball and a block"


@dataclass(frozen=True)
class Edit:
    """An edit and its ground truth."""

    slug: str
    """Name in files and tables."""
    kind: str
    """Kind of edit: recolor, turn-into, add, global or none."""
    target: str
    """Edited object, one of OBJECTS; empty for the kinds global and none."""
    wordings: tuple[str, ...]
    """Equivalent instructions; the first is the canonical one."""
    caption: str
    """Caption of the edited image."""
    change: Callable[[Scene], Scene]
    """Returns the edited scene; must not move objects."""


def _recolor(target: str, color: str) -> Edit:
    wordings = (
        f"make the {target} {color}",
        f"paint the {target} {color}",
        f"turn the {target} {color}",
        f"change the color of the {target} to {color}",
        f"the {target} should be {color}",
    )
    # Another canonical wording for variety in examples.
    if target == "block":
        wordings = (wordings[1], wordings[0], *wordings[2:])
    captions = {
        "ball": f"a photo of a toy bear, a {color} ball and a block",
        "block": f"a photo of a toy bear, a ball and a {color} block",
    }
    return Edit(
        slug=f"{target}-{color}",
        kind="recolor",
        target=target,
        wordings=wordings,
        caption=captions[target],
        change=lambda scene: with_colors(scene, {target: NAMED_COLORS[color]}),
    )


_FUR = tuple(name for name, _, _ in BEAR_PARTS if name not in ("nose", "left eye", "right eye")) + ("eye patch",)
_WHITE, _ICE, _BLACK = (0.95, 0.95, 0.93), (0.93, 0.95, 0.97), (0.07, 0.07, 0.08)


def _panda(scene: Scene) -> Scene:
    white = ("body", "head", "snout")
    return with_colors(scene, {part: _WHITE if part in white else _BLACK for part in _FUR})


def _polar_bear(scene: Scene) -> Scene:
    return with_colors(scene, dict.fromkeys(_FUR, _ICE))


def _snow(scene: Scene) -> Scene:
    sky = torch.tensor([[0.86, 0.88, 0.91], [0.72, 0.76, 0.82]]).expand_as(scene.sky_colors)
    return replace(scene, snow=torch.ones_like(scene.snow), sky_colors=sky)


def _night(scene: Scene) -> Scene:
    return replace(
        scene,
        sky_colors=torch.tensor([[0.07, 0.09, 0.20], [0.02, 0.03, 0.09]]).expand_as(scene.sky_colors),
        light_color=scene.light_color * torch.tensor([0.28, 0.32, 0.48]),
        ambient=scene.ambient * torch.tensor([0.26, 0.30, 0.48]),
    )


EDITS: tuple[Edit, ...] = (
    *(_recolor(target, color) for target in ("ball", "block") for color in NAMED_COLORS),
    Edit(
        "panda",
        "turn-into",
        "bear",
        ("turn the bear into a panda", "make the bear a panda", "make it a panda", "replace the bear with a panda"),
        "a photo of a panda, a ball and a block",
        _panda,
    ),
    Edit(
        "polar-bear",
        "turn-into",
        "bear",
        (
            "turn the bear into a polar bear",
            "make the bear a polar bear",
            "make it a polar bear",
            "replace the bear with a polar bear",
        ),
        "a photo of a polar bear, a ball and a block",
        _polar_bear,
    ),
    Edit(
        "hat",
        "add",
        "hat",
        ("give the bear a hat", "put a hat on the bear", "add a hat", "make the bear wear a hat"),
        "a photo of a toy bear with a hat, a ball and a block",
        lambda scene: replace(scene, hat=torch.ones_like(scene.hat)),
    ),
    Edit(
        "sunglasses",
        "add",
        "sunglasses",
        (
            "give the bear sunglasses",
            "put sunglasses on the bear",
            "add sunglasses",
            "make the bear wear sunglasses",
        ),
        "a photo of a toy bear with sunglasses, a ball and a block",
        lambda scene: replace(scene, sunglasses=torch.ones_like(scene.sunglasses)),
    ),
    Edit(
        "snow",
        "global",
        "",
        ("make it look like it just snowed", "make it snow", "add snow", "cover it in snow"),
        "a photo of a toy bear, a ball and a block in the snow",
        _snow,
    ),
    Edit(
        "night",
        "global",
        "",
        ("make it night", "make it look like night", "turn it into night", "make it dark"),
        "a photo of a toy bear, a ball and a block at night",
        _night,
    ),
    Edit(
        "no-change",
        "none",
        "",
        ("don't change the image", "leave it as it is", "change nothing", "keep the image"),
        CAPTION,
        lambda scene: scene,
    ),
)
BY_SLUG = {edit.slug: edit for edit in EDITS}
LOCAL_KINDS = ("recolor", "turn-into", "add")


def normalize(instruction: str) -> str:
    """Convert an instruction to lower case with single spaces and without final punctuation."""
    return " ".join(instruction.lower().split()).rstrip(".!?,; ")


def find(instruction: str) -> Edit | None:
    """Return the edit of an instruction, or None if no wording matches."""
    normalized = normalize(instruction)
    return next((edit for edit in EDITS if normalized in edit.wordings), None)


def apply(edit: Edit, scene: Scene) -> Scene:
    """Return the edited scenes: the ground truth of an edit.

    Args:
        edit: The edit.
        scene: The scenes before the edit; not modified.
    """
    return edit.change(scene)
