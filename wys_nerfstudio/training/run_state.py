"""The state of a run beside weights and optimizers. It is part of every checkpoint, so that one rename saves everything."""

import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from wys_nerfstudio.training.distributed import rank
from wys_nerfstudio.training.history import HistoryEntry
from wys_nerfstudio.training.schedule import PhaseSchedule
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.errors import WysError

STATE_KEY = "wys"
"""Key of the state in a checkpoint."""
SETTINGS_KEY = "_extra_state"
"""Key, among the pipeline's weights, of what renders and evaluation need too: settings, and whether the edit is localized."""

VIEWS_PARTS = {"names", "size", "pictures", "cameras", "edited", "current", "reference"}
"""Parts of the state of the views."""


@dataclass
class RunState:
    """The state between two steps: numbers, strings, tensors and containers of them."""

    step: int
    """The last trained step."""
    schedule: PhaseSchedule
    """Phases of the run."""
    settings: RunSettings
    """Settings in force. A checkpoint holds them under `SETTINGS_KEY`."""
    localized: bool
    """Whether the current edit has relevance. A checkpoint holds it under `SETTINGS_KEY`."""
    cli_settings: RunSettings
    """Settings that the run was started with. Of those that differ on resuming, the newly typed ones replace `settings`."""
    edits: int
    """Number of edits begun so far, skipped ones included."""
    recorded: int
    """Number of lines in `edits.jsonl`. Not the number of edits, which Undo lowers."""
    pending: list[dict[str, Any]]
    """Edits that are computed and not yet committed."""
    views: dict[str, Any]
    """Edited views and their reference, as returned by `WysDataManager.views_state`."""
    history: list[dict[str, Any]]
    """Entries of the history, oldest first."""
    scene: dict[str, Any]
    """State of the scene that is no weight, as returned by `WysModel.training_state`."""
    lr_warmup_start: int
    """Step at which learning-rate warmup began or will begin."""
    random: list[dict[str, Any]]
    """Result of `random_state` on each rank."""

    def data(self) -> dict[str, Any]:
        """Return the state, but for what `SETTINGS_KEY` holds, as torch's weights-only loader reads it."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        del values["settings"], values["localized"]
        return {**values, "schedule": vars(self.schedule), "cli_settings": self.cli_settings.as_dict()}

    def random_of_this_rank(self) -> Optional[dict[str, Any]]:
        """Return the state of this rank's random numbers; None for a rank that did not exist when it was saved."""
        return self.random[rank()] if rank() < len(self.random) else None

    def resumed_settings(self, typed: RunSettings) -> RunSettings:
        """Return the settings that a resumed run continues with: those in force, but for options that are typed differently
        from when the run was started.

        Args:
            typed: Settings of the resuming command line; an empty instruction is the run's.

        Raises:
            WysError: If the instruction is another one.
        """
        known = ("", self.settings.instruction, self.cli_settings.instruction)
        if typed.instruction not in known:
            raise WysError(
                f'--load-dir resumes a run whose instruction is "{self.settings.instruction}": leave out --instruction, or '
                "give the run to --base-run to apply another instruction to its scene."
            )
        before, current = self.cli_settings.as_dict(), self.settings.as_dict()
        changed = {name: value for name, value in typed.as_dict().items() if value != before[name]}
        return RunSettings(**{**current, **changed, "instruction": self.settings.instruction})

    def resumed_cli_settings(self, typed: RunSettings) -> RunSettings:
        """Return what a resumed run stores as `cli_settings`: what is typed now; an empty instruction stays the run's."""
        return RunSettings(**{**typed.as_dict(), "instruction": typed.instruction or self.cli_settings.instruction})

    @staticmethod
    def from_checkpoint(checkpoint: dict[str, Any], path: Path) -> "RunState":
        """Return the state in a checkpoint.

        Args:
            checkpoint: Result of `read_checkpoint`.
            path: The checkpoint's file, for the error message.

        Raises:
            WysError: If the state is missing or damaged.
        """
        data = checkpoint.get(STATE_KEY)
        try:
            shown = checkpoint["pipeline"][SETTINGS_KEY]
            state = RunState(
                **{
                    **data,  # type: ignore
                    "schedule": PhaseSchedule(**data["schedule"]),  # type: ignore
                    "settings": RunSettings(**shown["settings"]),
                    "localized": shown["localized"],
                    "cli_settings": RunSettings(**data["cli_settings"]),  # type: ignore
                }
            )
            kinds = [
                (state.step, int),
                (state.edits, int),
                (state.recorded, int),
                (state.lr_warmup_start, int),
                (state.localized, bool),
            ]
            kinds += [(part, list) for part in (state.history, state.random, state.pending)]
            kinds += [(part, dict) for part in (state.views, state.scene)]
            kinds += [(steps, int) for steps in vars(state.schedule).values()]
            kinds += [(settings.instruction, str) for settings in (state.settings, state.cli_settings)]
            if not all(isinstance(value, kind) for value, kind in kinds):
                raise TypeError("a part of the state has another type")
            if not [HistoryEntry(**entry) for entry in state.history]:
                raise KeyError("history")
            if not state.views.keys() >= VIEWS_PARTS:
                raise KeyError("views")
        except (TypeError, KeyError) as error:
            raise WysError(
                f'The run cannot be resumed from "{path}", which does not contain its edits. Give it to --base-run instead, '
                "to start a new edit from its scene."
            ) from error
        return state


def random_state() -> dict[str, Any]:
    """Return the state of the random number generators of Python, numpy and torch."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the result of `random_state`; the part of GPUs only if their number is the same."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
