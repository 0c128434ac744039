"""Checkpoints: finding, reading and writing them, and base runs.

Checkpoints are read by torch's weights-only loader. A base run's config.yml, which is a pickle in YAML clothes, is only
ever read as plain data: its tags are ignored, nothing in it is executed.
"""

import json
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import yaml
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn

from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.utils.atomic_io import write_tensors
from wys_nerfstudio.utils.errors import WysError

CAPTURED_SCENE = "captured.ckpt"
"""In a run's `wys` folder: the weights as they were before the first edit."""
RELEVANCE_PREFIX = "field.mlp_relevance."
MODEL_PREFIX = "_model."
NOT_COMPARED = ("lpips.", "psnr.", "device_indicator_param", "camera_optimizer.")
"""State that carries nothing of the scene, or (poses) is taken where it is there."""


def register_safe_globals() -> None:
    """Lets torch's weights-only loader read nerfstudio's checkpoints.

    nerfstudio's schedulers compute learning rates with numpy, so its checkpoints hold numpy scalars, which torch from
    2.6 on refuses unless they are registered; they are plain numbers.
    """
    scalar = np.float64(0).__reduce__()[0]  # wherever this numpy keeps it
    names = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    torch.serialization.add_safe_globals([*names, np.dtype, type(np.dtype(np.float64))])  # type: ignore


def find_checkpoint(path: Path, option: str, step: Optional[int] = None) -> Path:
    """The newest checkpoint of a run that is not damaged.

    Args:
        path: A run's folder, its config.yml, its folder of checkpoints, or one checkpoint.
        option: The option that the path came from, for the error's sentence.
        step: The checkpoint's step, if it is not to be the newest.

    Raises:
        WysError: If there is none.
    """
    if path.suffix == ".ckpt" and path.is_file():
        return path
    folder = path.parent if path.is_file() else path
    found = [*folder.glob("step-*.ckpt"), *(folder / "nerfstudio_models").glob("step-*.ckpt")]
    if not found:
        raise WysError(
            f'There is no checkpoint in "{path}": {option} takes the folder or the config.yml of a finished nerfacto or wys '
            "run, such as outputs/scene/nerfacto/2025-01-01_120000."
        )
    newest_first = sorted(found, key=lambda checkpoint: checkpoint.name, reverse=True)
    if step is not None:
        chosen = [checkpoint for checkpoint in newest_first if checkpoint.name == checkpoint_name(step)]
        if not chosen:
            names = ", ".join(str(int(checkpoint.stem.removeprefix("step-"))) for checkpoint in newest_first)
            raise WysError(f'There is no checkpoint of step {step} in "{path}": --load-step can be {names}.')
        return chosen[0]
    for checkpoint in newest_first[:-1]:
        try:
            read_checkpoint(checkpoint)
            return checkpoint
        except WysError as error:
            CONSOLE.print(f"{error} The one before it is used.", markup=False)
    return newest_first[-1]


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest checkpoint in a folder of checkpoints, if there is one; it is not read."""
    return max(folder.glob("step-*.ckpt"), key=lambda checkpoint: checkpoint.name, default=None)


def checkpoint_name(step: int) -> str:
    """How nerfstudio names the checkpoint of a step."""
    return f"step-{step:09d}.ckpt"


def run_folder(checkpoint: Path) -> Path:
    """The run's folder that a checkpoint lies in: the nearest one above it with a config.yml."""
    return next(
        (folder for folder in checkpoint.parents if (folder / "config.yml").is_file()), checkpoint.parent.parent
    )


@main_process_only
def save_checkpoint_file(folder: Path, checkpoint: dict[str, Any], only_latest: bool) -> None:
    """Writes a checkpoint into a run's folder of checkpoints.

    Args:
        folder: The folder of checkpoints.
        checkpoint: As of `read_checkpoint`.
        only_latest: Remove older ones, but for the one before it: should this one ever be damaged, that one is used.
    """
    path = folder / checkpoint_name(checkpoint["step"])
    if only_latest:
        # Before this one is written, so that whoever is killed right after it has nothing left to do.
        found = sorted(folder.glob("step-*.ckpt"))
        before = [other for other in found if other.name < path.name]
        for other in {*found} - {path, *before[-1:]}:  # also those of a later step, which this run has gone back from
            other.unlink()
    # The partial file is not beside it: nerfstudio takes every name in that folder for a checkpoint's.
    write_tensors(path, checkpoint, partial=folder.parent / "wys" / "checkpoint.partial")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as nerfstudio wrote it, read without unpickling anything but tensors and numbers.

    Raises:
        WysError: If the file is damaged, or needs more than that.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the damage leads torch to
        first_line = (str(error).strip().splitlines() or ["it is empty"])[0]
        raise WysError(f'The checkpoint "{path}" could not be read: {first_line.rstrip(".")}.') from error
    if not isinstance(state, dict) or "pipeline" not in state or "step" not in state:
        raise WysError(f'"{path}" is no nerfstudio checkpoint: it has no "pipeline" in it.')
    return state


def model_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's part of a checkpoint, without the prefixes of pipeline and DDP."""
    state = {}
    for key, value in checkpoint["pipeline"].items():
        if key.startswith(MODEL_PREFIX):
            state[key.removeprefix(MODEL_PREFIX).removeprefix("module.")] = value
    return state


def is_wys(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint comes from this method."""
    return any(key.startswith(RELEVANCE_PREFIX) for key in model_state(checkpoint))


class _PlainLoader(yaml.SafeLoader):
    """Reads a config.yml as nested dicts and lists, whatever Python objects it names."""


def _plain(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def read_run_config(folder: Path) -> dict[str, Any]:
    """A run's config.yml as plain data; empty if there is none or it is no mapping."""
    path = folder / "config.yml"
    if not path.is_file():
        return {}
    try:
        config = yaml.load(path.read_text("utf8"), Loader=_PlainLoader)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


# Model options that decide the shapes of a nerfacto checkpoint, as they are typed.
_SHAPE_OPTIONS = (
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

# Those that no key and no shape of a checkpoint shows, but that change what its weights mean.
_UNSEEN_OPTIONS = ("base_res", "average_init_density", "disable_scene_contraction")


def load_base(model: nn.Module, path: Path, transform: Optional[dict[str, Any]] = None) -> None:
    """Puts a base run's scene into the model: every key and shape is checked first, nothing is loaded half.

    Args:
        model: A `WysModel`. Its relevance head stays as it is: the base knows nothing of this instruction.
        path: As for `find_checkpoint`.
        transform: This run's `dataparser_transforms.json` as data, to be compared with the base's.

    Raises:
        WysError: If the checkpoint is not a scene of this model's shape, backend and number of views.
    """
    checkpoint = find_checkpoint(path, "--base-run")
    state = model_state(read_checkpoint(checkpoint))
    ours = model.state_dict()
    wanted = {k for k in ours if not k.startswith((RELEVANCE_PREFIX, "field.relevance_", *NOT_COMPARED))}
    offered = {k for k in state if not k.startswith((RELEVANCE_PREFIX, "field.relevance_", *NOT_COMPARED))}
    config = read_run_config(run_folder(checkpoint))
    method = config.get("method_name", "this")

    tcnn = {k for k in offered if k.endswith(("tcnn_encoding.params", "mlp_base.model.params"))}
    if tcnn and wanted != offered:
        raise WysError(
            f'The base run "{path}" was trained with tiny-cuda-nn, whose weights only tiny-cuda-nn can read. Install it, '
            "or train the base again with --pipeline.model.implementation torch."
        )
    if wanted != offered:
        different = sorted(wanted ^ offered)
        raise WysError(
            f'The base run "{path}" is not a scene of this shape: {different[0]} is only in '
            f"{'this model' if different[0] in wanted else 'the base'}. {_advice(config, model, method)}"
        )
    views = {k for k in wanted if "embedding_appearance" in k}
    for key in sorted(wanted, key=lambda k: (k not in views, k)):
        if state[key].shape == ours[key].shape:
            continue
        if key in views and state[key].shape[1:] == ours[key].shape[1:]:
            raise WysError(
                f'The base run "{path}" was trained on {len(state[key])} views and this data has {len(ours[key])}: use the '
                "same --data and the same dataparser options as the base run."
            )
        raise WysError(
            f'The base run "{path}" is not a scene of this shape: {key} is {tuple(state[key].shape)} there and '
            f"{tuple(ours[key].shape)} here. {_advice(config, model, method)}"
        )
    # Buffers such as max_res are numbers that shapes do not show.
    for key in sorted(wanted):
        owner, name = key.rpartition(".")[::2]
        if name not in ("max_res", "num_levels", "log2_hashmap_size") or int(state[key]) == int(ours[key]):
            continue
        option = f"{name.replace('_', '-')} {int(state[key])}" if owner == "field" else "proposal-net-args-list"
        raise WysError(
            f'The base run "{path}" has {key} {int(state[key])} and this model {int(ours[key])}: give this run the base\'s '
            f"--pipeline.model.{option}."
        )
    unseen = _flags(config, model, _UNSEEN_OPTIONS)
    if unseen:
        raise WysError(f'The base run "{path}" has other settings than this run: add {" ".join(unseen)}.')
    _check_transform(path, run_folder(checkpoint) / "dataparser_transforms.json", transform)
    poses = {k: v for k, v in state.items() if k.startswith("camera_optimizer.")}
    for key, value in poses.items():
        if key not in ours:
            raise WysError(
                f'The base run "{path}" has learned pose corrections, which this run would drop: add '
                "--pipeline.model.camera-optimizer.mode SO3xR3, or the mode of the base."
            )
        if value.shape != ours[key].shape:
            raise WysError(
                f'The base run "{path}" was trained on {len(value)} views and this data has {len(ours[key])}: use the same '
                "--data and the same dataparser options as the base run."
            )
    model.load_state_dict({**ours, **{k: state[k] for k in wanted}, **poses}, strict=True)


def _advice(config: dict[str, Any], model: nn.Module, method: str) -> str:
    flags = _flags(config, model, _SHAPE_OPTIONS)
    if flags:
        return f"Give this run the base's settings: {' '.join(flags)}."
    return f"--base-run takes a nerfacto or wys run of the same settings, and this is a {method} run."


def _flags(config: dict[str, Any], model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Those options, as they are typed, in which the base's config.yml differs from this model."""
    pipeline = config.get("pipeline")
    theirs = pipeline.get("model") if isinstance(pipeline, dict) else None
    if not isinstance(theirs, dict):
        return []
    ours = vars(model.config)  # type: ignore
    different = (name for name in names if name in theirs and theirs[name] != ours[name])
    return [f"--pipeline.model.{name.replace('_', '-')} {theirs[name]}" for name in different]


def _check_transform(path: Path, file: Path, transform: Optional[dict[str, Any]]) -> None:
    if transform is None or not file.is_file():
        return
    theirs = json.loads(file.read_text("utf8"))
    same_scale = np.isclose(theirs["scale"], transform["scale"], rtol=1e-4)
    if not same_scale or not np.allclose(theirs["transform"], transform["transform"], atol=1e-4):
        raise WysError(
            f'The base run "{path}" saw the cameras in another place or scale: use the same --data and the same dataparser '
            "options as the base run."
        )
