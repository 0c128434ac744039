"""What was applied to a scene, one entry after the other, and how it looked before each: in the run's `wys` folder."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch

from wys_nerfstudio.errors import WysError

HISTORY_FILE = "history.json"
SNAPSHOTS = "history"
"""Folder of the snapshots, beside the file."""


@dataclass(frozen=True)
class Entry:
    """One thing that happened to the scene."""

    instruction: str
    """What was applied; what had been applied, for a reset."""
    start: Literal["captured", "on top", "instead", "reset"]
    """The run's first instruction, one on top of the scene as it was, one on the captured scene, or a reset."""
    settings: dict[str, Any]
    """The settings that it began with."""
    first_step: int
    """Step from which it was in force."""
    snapshot: Optional[str]
    """File, relative to the `wys` folder, with everything as it was before; the first entry has none."""


class History:
    """The entries of a run, always as they are on disk.

    Args:
        folder: The run's `wys` folder.

    Raises:
        WysError: If there is a history and it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.entries: list[Entry] = []
        path = folder / HISTORY_FILE
        if path.is_file():
            try:
                self.entries = [Entry(**entry) for entry in json.loads(path.read_text("utf8"))]
            except (ValueError, TypeError) as error:
                raise WysError(f'The history "{path}" is damaged: move it away to go on without undo.') from error

    def add(
        self, instruction: str, start: Literal["captured", "on top", "instead", "reset"], settings: dict[str, Any],
        first_step: int, before: Optional[dict[str, Any]],
    ) -> None:  # fmt: skip
        """Appends an entry.

        Args:
            instruction: As in `Entry`.
            start: As in `Entry`.
            settings: As in `Entry`.
            first_step: As in `Entry`.
            before: Snapshot of the moment before; tensors, numbers, strings and containers of them.
        """
        snapshot = None
        if before is not None:
            snapshot = f"{SNAPSHOTS}/{len(self.entries):03d}.ckpt"
            (self._folder / SNAPSHOTS).mkdir(parents=True, exist_ok=True)
            partial = self._folder / f"{snapshot}.partial"
            torch.save(before, partial)
            os.replace(partial, self._folder / snapshot)
        self.entries.append(Entry(instruction, start, settings, first_step, snapshot))
        self._write()

    def last_snapshot(self) -> dict[str, Any]:
        """The snapshot from before the last entry.

        Raises:
            WysError: If the last entry is the run's first, or its snapshot cannot be read.
        """
        if len(self.entries) < 2:
            raise WysError("There is nothing to undo: nothing was applied since the run began. Reset returns to the "
                           "captured scene.")  # fmt: skip
        path = self._folder / str(self.entries[-1].snapshot)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise WysError(f'The snapshot "{path}" cannot be read, so this cannot be undone.') from error

    def drop_last(self) -> None:
        """Removes the last entry, and then its snapshot."""
        entry = self.entries.pop()
        self._write()
        if entry.snapshot is not None:
            (self._folder / entry.snapshot).unlink(missing_ok=True)

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{HISTORY_FILE}.partial"
        partial.write_text(json.dumps([asdict(entry) for entry in self.entries], indent=1), "utf8")
        os.replace(partial, self._folder / HISTORY_FILE)
