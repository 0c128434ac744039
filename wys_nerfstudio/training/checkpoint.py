"""Checkpoints: finding, reading and writing them. They are read by torch's weights-only loader."""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.utils.atomic_io import write_tensors
from wys_nerfstudio.utils.errors import WysError

CAPTURED_SCENE = "captured.ckpt"
"""File in a run's `wys` folder: the weights before the first edit."""
RELEVANCE_PREFIX = "field.mlp_relevance."
MODEL_PREFIX = "_model."
FOLDER_ATTRIBUTE = 0x10
"""Attribute of a folder in a zip file: torch reads no content for an entry that has it."""
TCNN_SUFFIXES = ("tcnn_encoding.params", "mlp_base.model.params")
"""Ends of the names of tiny-cuda-nn's parameters: one vector per encoding or network."""


def register_safe_globals() -> None:
    """Let torch's weights-only loader read nerfstudio's checkpoints.

    nerfstudio's schedulers compute learning rates with numpy, so its checkpoints hold numpy scalars. From 2.6 on torch
    refuses these unless they are registered; they are plain numbers.
    """
    scalar = np.float64(0).__reduce__()[0]  # its module differs between versions of numpy
    names = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    torch.serialization.add_safe_globals([*names, np.dtype, type(np.dtype(np.float64))])  # type: ignore


def find_checkpoint(path: Path, option: str, step: Optional[int] = None) -> Path:
    """Return the newest undamaged checkpoint of a run.

    Args:
        path: A run's folder, its config.yml, its folder of checkpoints, or one checkpoint.
        option: The option that the path came from, for the error message.
        step: Step of the checkpoint; by default the newest.

    Raises:
        WysError: If there is none.
    """
    if path.suffix == ".ckpt" and path.is_file():
        return path
    folder = path.parent if path.is_file() else path
    found = [*folder.glob("step-*.ckpt"), *(folder / "nerfstudio_models").glob("step-*.ckpt")]
    if not found:
        raise WysError(
            f'No checkpoint found in "{path}": {option} takes the folder or the config.yml of a finished nerfacto or wys '
            "run, such as outputs/scene/nerfacto/2025-01-01_120000."
        )
    newest_first = sorted(found, key=lambda checkpoint: checkpoint.name, reverse=True)
    if step is not None:
        chosen = [checkpoint for checkpoint in newest_first if checkpoint.name == checkpoint_name(step)]
        if not chosen:
            steps = ", ".join(str(int(checkpoint.stem.removeprefix("step-"))) for checkpoint in newest_first)
            raise WysError(f'No checkpoint of step {step} found in "{path}": --load-step can be {steps}.')
        return chosen[0]
    for checkpoint in newest_first[:-1]:
        try:
            read_checkpoint(checkpoint)
            return checkpoint
        except WysError as error:
            CONSOLE.print(f"{error} The previous one is used.", markup=False)
    return newest_first[-1]


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """Return the newest checkpoint in a folder of checkpoints without reading it; None if there is none."""
    return max(folder.glob("step-*.ckpt"), key=lambda checkpoint: checkpoint.name, default=None)


def checkpoint_name(step: int) -> str:
    """Return nerfstudio's file name of a checkpoint."""
    return f"step-{step:09d}.ckpt"


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to: the nearest parent with a config.yml."""
    return next(
        (folder for folder in checkpoint.parents if (folder / "config.yml").is_file()), checkpoint.parent.parent
    )


@main_process_only
def save_checkpoint_file(folder: Path, checkpoint: dict[str, Any], only_latest: bool) -> None:
    """Write a checkpoint into a run's folder of checkpoints.

    Args:
        folder: The folder of checkpoints.
        checkpoint: Content, as returned by `read_checkpoint`.
        only_latest: Remove all others except the previous one, which replaces this one if it is ever damaged.
    """
    path = folder / checkpoint_name(checkpoint["step"])
    if only_latest:
        # Removed first: if the run is killed after the write, nothing is left to do.
        found = sorted(folder.glob("step-*.ckpt"))
        before = [other for other in found if other.name < path.name]
        for other in {*found} - {path, *before[-1:]}:  # including later steps, from which this run has gone back
            other.unlink()
    # Written in another folder first: nerfstudio takes every file in that folder for a checkpoint.
    write_tensors(path, checkpoint, partial=folder.parent / "wys" / "checkpoint.partial")


def copy_to_cpu(state: Any, copies: Optional[dict[int, Tensor]] = None) -> Any:
    """Return a copy of nested dicts and lists whose tensors are in main memory and stay as they are now.

    Args:
        state: Dicts, lists, tensors and plain values.
        copies: Copies made so far, by the tensors' identity: a tensor with two names is copied once.
    """
    copies = {} if copies is None else copies
    if isinstance(state, Tensor):
        if id(state) not in copies:
            copies[id(state)] = state.detach().to("cpu", copy=True)
        return copies[id(state)]
    if isinstance(state, dict):
        return {key: copy_to_cpu(value, copies) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_cpu(value, copies) for value in state)
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint of nerfstudio, unpickling nothing but tensors and numbers.

    Raises:
        WysError: If the file is damaged, or contains anything else.
    """
    try:
        # torch writes a checksum of every tensor and verifies none.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            folders = [part.filename for part in archive.infolist() if part.external_attr & FOLDER_ATTRIBUTE]
        if damaged or folders:
            raise zipfile.BadZipFile(f'the entry "{damaged or folders[0]}" is damaged')
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise many types
        first_line = (str(error).strip().splitlines() or ["it is empty"])[0]
        raise WysError(f'The checkpoint "{path}" could not be read: {first_line.rstrip(".")}.') from error
    if not isinstance(state, dict) or "pipeline" not in state or "step" not in state:
        raise WysError(f'"{path}" is not a nerfstudio checkpoint: it has no entry "pipeline".')
    return state


def model_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the model's part of a checkpoint, without the prefixes of pipeline and DDP."""
    state = {}
    for key, value in checkpoint["pipeline"].items():
        if key.startswith(MODEL_PREFIX):
            state[key.removeprefix(MODEL_PREFIX).removeprefix("module.")] = value
    return state


def is_wys(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint comes from this method."""
    return any(key.startswith(RELEVANCE_PREFIX) for key in model_state(checkpoint))


def check_backend(what: str, weights: Iterable[str], current: Iterable[str]) -> None:
    """Refuse weights that another backend of encodings and networks has trained.

    Args:
        what: The run that they come from.
        weights: Names of the weights.
        current: Names of the model's weights.

    Raises:
        WysError: If one of them comes from tiny-cuda-nn and the other one does not.
    """
    theirs, ours = (any(key.endswith(TCNN_SUFFIXES) for key in keys) for keys in (weights, current))
    if theirs and not ours:
        raise WysError(
            f"{what} was trained with tiny-cuda-nn, whose weights only tiny-cuda-nn can read. Install it and add "
            "--pipeline.model.implementation tcnn, or train that run again with --pipeline.model.implementation torch."
        )
    if ours and not theirs:
        raise WysError(f"{what} was trained without tiny-cuda-nn: add --pipeline.model.implementation torch.")
