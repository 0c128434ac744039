"""What a resumed run must know and no weight tells it. It is part of every checkpoint, so that the one rename which puts a
checkpoint in its place moves everything at once."""

import json
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from wys_nerfstudio.training.distributed import rank
from wys_nerfstudio.training.history import HistoryEntry
from wys_nerfstudio.training.schedule import PhaseSchedule
from wys_nerfstudio.utils.errors import WysError

STATE_KEY = "wys"
"""Of a checkpoint: where the state is."""


@dataclass
class RunState:
    """The state of a run between two steps; numbers, strings, tensors and containers of them."""

    step: int
    """The step that has just been trained."""
    plan: PhaseSchedule
    """Phases of the run."""
    edits: int
    """Edits begun so far, skipped ones included; the next edit's number."""
    pending: list[dict[str, Any]]
    """Edits that are made and not yet in place, of an editor that works while training goes on."""
    settings: dict[str, Any]
    """Instruction and live settings as they are now."""
    cli_settings: dict[str, Any]
    """The same as the run was started with; what is typed otherwise when it is resumed wins over `settings`."""
    views: dict[str, Any]
    """Edited views and what they were edited from, as of `WysDataManager.state`."""
    history: list[dict[str, Any]]
    """Entries of the history, oldest first."""
    sampler: dict[str, float]
    """Counters of the proposal sampler, which decide where samples lie while a scene is young."""
    lr_warmup_start: int
    """Step from which learning rates rise or rose."""
    proposals_pretrained: bool
    """Whether the proposal networks came trained."""
    random: list[dict[str, Any]]
    """As of `random_state`, of each rank."""

    def data(self) -> dict[str, Any]:
        """The state as torch's weights-only loader reads it."""
        return {**{option.name: getattr(self, option.name) for option in fields(self)}, "plan": vars(self.plan)}

    def random_of_this_rank(self) -> Optional[dict[str, Any]]:
        """As of `random_state`; None for a rank that was not there when the state was taken."""
        return self.random[rank()] if rank() < len(self.random) else None

    @staticmethod
    def of(checkpoint: dict[str, Any], path: Path) -> "RunState":
        """The state in a checkpoint.

        Args:
            checkpoint: As of `read_checkpoint`.
            path: Its file, for the error's sentence.

        Raises:
            WysError: If it is missing or damaged.
        """
        data = checkpoint.get(STATE_KEY)
        try:
            state = RunState(**{**data, "plan": PhaseSchedule(**data["plan"])})  # type: ignore
            kinds = [(state.step, int), (state.edits, int), (state.lr_warmup_start, int)]
            kinds += [(part, list) for part in (state.history, state.random, state.pending)]
            kinds += [(part, dict) for part in (state.settings, state.cli_settings, state.views, state.sampler)]
            kinds += [(steps, int) for steps in vars(state.plan).values()]
            if not all(isinstance(value, kind) for value, kind in kinds):
                raise TypeError("a part of the state is of another kind")
            if "instruction" not in state.settings or state.settings.keys() != state.cli_settings.keys():
                raise KeyError("instruction")
            if not [HistoryEntry(**entry) for entry in state.history]:
                raise KeyError("history")
        except (TypeError, KeyError) as error:
            raise WysError(
                f'The run cannot be resumed from "{path}": the edits are not in it. Give it to --base-run instead, to '
                "start a new edit from its scene."
            ) from error
        return state


def random_state() -> dict[str, Any]:
    """Where Python's, numpy's and torch's random numbers are."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(states: dict[str, Any]) -> None:
    """Goes back to `random_state`; GPUs that are no longer there are left out."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def edit_records(folder: Path, before_step: Optional[int] = None) -> list[str]:
    """Lines of a run's edits.jsonl, up to a step if one is given. A line that a killed run left half written is no line."""
    path = folder / "edits.jsonl"
    lines = []
    for line in path.read_text("utf8").splitlines() if path.is_file() else []:
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if before_step is None or step < before_step:
            lines.append(line)
    return lines
