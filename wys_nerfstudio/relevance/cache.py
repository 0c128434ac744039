"""Cache of raw relevance maps on disk, keyed by everything that they depend on."""

import hashlib
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
    """Everything that a set of relevance maps depends on, except the captured views: the key of the cache."""

    editor: str
    """Name of the editor."""
    dtype: str
    """Precision of its weights, such as "float16"."""
    instruction: str
    """What to change."""
    noise_level: float
    """t_rel as a share of the diffusion."""
    num_samples: int
    """Number of noise samples averaged."""
    seed: int
    """The run's seed."""
    resolution: Optional[int]
    """Editing resolution; None for the editor's default."""
    reference: str = ""
    """Hash of the views' content (`WysDataManager.reference_hash`); empty for the captured views."""


def find_maps(folder: Path, request: RelevanceRequest, names: Sequence[str]) -> Optional[Float[Tensor, "n lh lw"]]:
    """Return the cached raw maps, or None if the folder holds none, damaged ones or those of another request.

    Args:
        folder: Folder of the cache.
        request: Required key.
        names: Names of the views.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / MAPS_FILE, "pt") as file:
            raw, key = file.get_tensor("raw"), (file.metadata() or {}).get("request")
    except (OSError, SafetensorError):
        return None
    return raw if key == _as_json(request, names, raw) else None


def save_maps(folder: Path, request: RelevanceRequest, names: Sequence[str], raw: Float[Tensor, "n lh lw"]) -> None:
    """Write raw maps to the cache; arguments as in `find_maps`."""
    from safetensors.torch import save

    metadata = {"request": _as_json(request, names, raw)}
    atomic_write(folder / MAPS_FILE, save({"raw": raw.contiguous()}, metadata=metadata))


def _as_json(request: RelevanceRequest, names: Sequence[str], raw: Tensor) -> str:
    content = {
        "views": list(names),
        "type": f"{raw.dtype} {list(raw.shape)}",
        "checksum": hashlib.sha256(raw.cpu().double().numpy().tobytes()).hexdigest(),
    }
    return json.dumps({**vars(request), **content}, sort_keys=True)
