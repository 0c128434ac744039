"""Raw relevance maps on disk, with what they are maps of: they are made once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from jaxtyping import Float
from torch import Tensor

from wys_nerfstudio.utils.atomic_io import atomic_write

MAPS_FILE = "maps.safetensors"


@dataclass(frozen=True)
class RelevanceRequest:
    """What a set of relevance maps depends on, beside the captured views. Maps of an equal request are not made twice."""

    editor: str
    """Name of the editor."""
    instruction: str
    """What to change."""
    noise_level: float
    """t_rel as a share of the diffusion."""
    num_samples: int
    """Noise draws averaged."""
    seed: int
    """The run's seed."""
    resolution: Optional[int]
    """Editing resolution; None is the editor's own."""
    reference: str = ""
    """What the views show, as of `WysDataManager.reference_hash`; empty for the captured views."""


def find_maps(folder: Path, request: RelevanceRequest, names: Sequence[str]) -> Optional[Float[Tensor, "n lh lw"]]:
    """The raw maps in a folder, if they are those that are asked for.

    Args:
        folder: Where they may be.
        request: What they must have been made of.
        names: The views' names.
    """
    from safetensors import safe_open

    path = folder / MAPS_FILE
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        known = (file.metadata() or {}).get("request") == _as_json(request, names)
        return file.get_tensor("raw") if known else None


def save_maps(folder: Path, request: RelevanceRequest, names: Sequence[str], raw: Float[Tensor, "n lh lw"]) -> None:
    """Writes raw maps where `find_maps` finds them."""
    from safetensors.torch import save

    atomic_write(folder / MAPS_FILE, save({"raw": raw.contiguous()}, metadata={"request": _as_json(request, names)}))


def _as_json(request: RelevanceRequest, names: Sequence[str]) -> str:
    return json.dumps({**vars(request), "views": list(names)}, sort_keys=True)
