"""Base runs: loading the scene of a finished nerfacto or wys run."""

import json
from pathlib import Path
from typing import Any, Optional

import numpy as np
from torch import Tensor, nn

from wys_nerfstudio.training.checkpoint import (
    RELEVANCE_PREFIX,
    find_checkpoint,
    model_state,
    read_checkpoint,
    run_folder,
)
from wys_nerfstudio.training.run_options import differing_flags, read_run_config
from wys_nerfstudio.training.scene_checks import SavedScene
from wys_nerfstudio.utils.errors import WysError

NOT_SCENE = ("lpips.", "psnr.", "device_indicator_param", "camera_optimizer.", RELEVANCE_PREFIX, "field.relevance_")
"""Prefixes of state that is not compared: it holds nothing of the scene, belongs to an instruction, or (poses) is optional."""


def load_base(model: nn.Module, path: Path, transform: Optional[dict[str, Any]] = None) -> None:
    """Load a base run's scene into a model, after checking every key and shape.

    Args:
        model: A `WysModel`. Its relevance head is not loaded: it belongs to an instruction.
        path: As for `find_checkpoint`.
        transform: This run's `dataparser_transforms.json` as data, to be compared with the base run's.

    Raises:
        WysError: If the checkpoint is not a scene of this model's shape, backend and number of views.
    """
    checkpoint = find_checkpoint(path, "--base-run")
    weights, current = model_state(read_checkpoint(checkpoint)), model.state_dict()
    config = read_run_config(run_folder(checkpoint))
    method = config.get("method_name", "this")
    remedy = f"--base-run takes a nerfacto or wys run of the same settings, and this is a {method} run."
    base = SavedScene(f'The base run "{path}"', weights, config, remedy)
    base.check(model, (key for key in {*weights, *current} if not key.startswith(NOT_SCENE)))
    if transform is not None:
        _check_transform(path, run_folder(checkpoint) / "dataparser_transforms.json", transform)
    poses = {key: value for key, value in weights.items() if key.startswith("camera_optimizer.")}
    _check_poses(base, poses, model)
    scene = {key: weights[key] for key in current if not key.startswith(NOT_SCENE)}
    model.load_state_dict({**current, **scene, **poses}, strict=True)


def _check_poses(base: SavedScene, poses: dict[str, Tensor], model: nn.Module) -> None:
    current, mode = model.state_dict(), differing_flags(base.config, model.config, ["camera_optimizer.mode"])
    for key, value in poses.items():
        if key not in current or mode:
            raise WysError(
                f"{base.run} has learned pose corrections, which this run would drop or misread: add "
                f"{mode[0] if mode else '--pipeline.model.camera-optimizer.mode SO3xR3, or the mode of the base'}."
            )
        if value.shape != current[key].shape:
            raise base.other_views(len(value), len(current[key]))


def _check_transform(path: Path, file: Path, transform: dict[str, Any]) -> None:
    if not file.is_file():
        return
    try:
        theirs = json.loads(file.read_text("utf8"))
        same_scale = np.isclose(theirs["scale"], transform["scale"], rtol=1e-4)
        same = same_scale and np.allclose(theirs["transform"], transform["transform"], atol=1e-4)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise WysError(
            f'The cameras of the base run "{path}" cannot be compared with this run\'s, because "{file.name}" is damaged: restore '
            "that file, or use another base run."
        ) from error
    if not same:
        raise WysError(
            f'The base run "{path}" has its cameras in another place or scale: use the same --data and the same dataparser '
            "options as the base run."
        )
