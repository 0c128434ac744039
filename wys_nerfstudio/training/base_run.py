"""Base runs: loading the scene of a finished nerfacto or wys run.

A run's config.yml is a pickle in YAML syntax. Here it is only read as plain data: its tags are ignored, nothing is executed.
"""

import json
from pathlib import Path
from typing import Any, Optional

import numpy as np
import yaml
from torch import Tensor, nn

from wys_nerfstudio.training.checkpoint import (
    RELEVANCE_PREFIX,
    check_backend,
    find_checkpoint,
    model_state,
    read_checkpoint,
    run_folder,
)
from wys_nerfstudio.utils.errors import WysError

NOT_SCENE = ("lpips.", "psnr.", "device_indicator_param", "camera_optimizer.", RELEVANCE_PREFIX, "field.relevance_")
"""Prefixes of state that is not compared: it holds nothing of the scene, belongs to an instruction, or (poses) is optional."""

SHAPE_OPTIONS = (
    "num_levels",
    "base_res",
    "max_res",
    "log2_hashmap_size",
    "features_per_level",
    "hidden_dim",
    "hidden_dim_color",
    "appearance_embed_dim",
    "use_appearance_embedding",
    "num_proposal_iterations",
    "use_same_proposal_network",
    "implementation",
)
"""Options of the model that decide the shapes of a checkpoint."""

UNSEEN_OPTIONS = ("base_res", "average_init_density", "disable_scene_contraction")
"""Options of the model that no key or shape of a checkpoint shows, but that change the meaning of its weights."""


class _PlainLoader(yaml.SafeLoader):
    """Reads a config.yml as nested dicts and lists, whatever Python objects its tags name."""


def _plain(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return a run's config.yml as plain data; empty if there is none or it is not a mapping."""
    path = folder / "config.yml"
    if not path.is_file():
        return {}
    try:
        config = yaml.load(path.read_text("utf8"), Loader=_PlainLoader)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


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
    base, current = model_state(read_checkpoint(checkpoint)), model.state_dict()
    scene = {key for key in current if not key.startswith(NOT_SCENE)}
    config = read_run_config(run_folder(checkpoint))
    _check_keys(path, base, scene, config, model)
    _check_shapes(path, base, current, scene, config, model)
    _check_buffers(path, base, current, scene)
    unseen = _flags(config, model, UNSEEN_OPTIONS)
    if unseen:
        raise WysError(f'The base run "{path}" has other settings than this run: add {" ".join(unseen)}.')
    _check_transform(path, run_folder(checkpoint) / "dataparser_transforms.json", transform)
    poses = {key: value for key, value in base.items() if key.startswith("camera_optimizer.")}
    _check_poses(path, poses, current)
    model.load_state_dict({**current, **{key: base[key] for key in scene}, **poses}, strict=True)


def _check_keys(path: Path, base: dict[str, Tensor], scene: set[str], config: dict[str, Any], model: nn.Module) -> None:
    offered = {key for key in base if not key.startswith(NOT_SCENE)}
    if scene == offered:
        return
    if any(key.startswith("field.mlp_base.") for key in offered):  # a scene, not one of another method
        check_backend(f'The base run "{path}"', offered, scene)
    different = sorted(scene ^ offered)[0]
    raise WysError(
        f'The base run "{path}" is not a scene of this shape: {different} is only in '
        f"{'this model' if different in scene else 'the base'}. {_advice(config, model)}"
    )


def _check_shapes(
    path: Path,
    base: dict[str, Tensor],
    current: dict[str, Tensor],
    scene: set[str],
    config: dict[str, Any],
    model: nn.Module,
) -> None:
    # Embeddings first: another number of views has a simpler explanation than another shape.
    for key in sorted(scene, key=lambda key: ("embedding_appearance" not in key, key)):
        if base[key].shape == current[key].shape:
            continue
        if "embedding_appearance" in key and base[key].shape[1:] == current[key].shape[1:]:
            raise _other_views(path, len(base[key]), len(current[key]))
        raise WysError(
            f'The base run "{path}" is not a scene of this shape: {key} is {tuple(base[key].shape)} there and '
            f"{tuple(current[key].shape)} here. {_advice(config, model)}"
        )


def _check_buffers(path: Path, base: dict[str, Tensor], current: dict[str, Tensor], scene: set[str]) -> None:
    """Refuse another maximum resolution and the like: buffers with numbers that shapes do not show."""
    for key in sorted(scene):
        owner, name = key.rpartition(".")[::2]
        if name not in ("max_res", "num_levels", "log2_hashmap_size") or int(base[key]) == int(current[key]):
            continue
        option = f"{name.replace('_', '-')} {int(base[key])}" if owner == "field" else "proposal-net-args-list"
        raise WysError(
            f'The base run "{path}" has {key} {int(base[key])} and this model {int(current[key])}: give this run the base\'s '
            f"--pipeline.model.{option}."
        )


def _check_poses(path: Path, poses: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    for key, value in poses.items():
        if key not in current:
            raise WysError(
                f'The base run "{path}" has learned pose corrections, which this run would drop: add '
                "--pipeline.model.camera-optimizer.mode SO3xR3, or the mode of the base."
            )
        if value.shape != current[key].shape:
            raise _other_views(path, len(value), len(current[key]))


def _other_views(path: Path, theirs: int, current: int) -> WysError:
    return WysError(
        f'The base run "{path}" was trained on {theirs} views and this data has {current}: use the same --data and the same '
        "dataparser options as the base run."
    )


def _advice(config: dict[str, Any], model: nn.Module) -> str:
    flags = _flags(config, model, SHAPE_OPTIONS)
    if flags:
        return f"Give this run the base's settings: {' '.join(flags)}."
    method = config.get("method_name", "this")
    return f"--base-run takes a nerfacto or wys run of the same settings, and this is a {method} run."


def _flags(config: dict[str, Any], model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Return those of some options, as typed, in which the base's config.yml differs from this model."""
    pipeline = config.get("pipeline")
    theirs = pipeline.get("model") if isinstance(pipeline, dict) else None
    if not isinstance(theirs, dict):
        return []
    current = vars(model.config)  # type: ignore
    different = (name for name in names if name in theirs and theirs[name] != current[name])
    return [f"--pipeline.model.{name.replace('_', '-')} {theirs[name]}" for name in different]


def _check_transform(path: Path, file: Path, transform: Optional[dict[str, Any]]) -> None:
    if transform is None or not file.is_file():
        return
    theirs = json.loads(file.read_text("utf8"))
    same_scale = np.isclose(theirs["scale"], transform["scale"], rtol=1e-4)
    if not same_scale or not np.allclose(theirs["transform"], transform["transform"], atol=1e-4):
        raise WysError(
            f'The base run "{path}" has its cameras in another place or scale: use the same --data and the same dataparser '
            "options as the base run."
        )
