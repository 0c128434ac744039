"""What was applied to a scene, one entry after the other, and how it looked before each: in the run's `wys` folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from wys_nerfstudio.training.checkpoint import read_checkpoint
from wys_nerfstudio.training.distributed import main_process_only
from wys_nerfstudio.utils.atomic_io import write_json, write_tensors
from wys_nerfstudio.utils.errors import WysError

HISTORY_FILE = "history.json"
SNAPSHOTS = "history"
"""Folder of the snapshots, beside the file."""


ApplyMode = Literal["captured", "on top", "instead", "reset"]


@dataclass(frozen=True)
class HistoryEntry:
    """One thing that happened to the scene."""

    instruction: str
    """What was applied; what had been applied, for a reset."""
    start: ApplyMode
    """The run's first instruction, one on top of the scene as it was, one on the captured scene, or a reset."""
    settings: dict[str, Any]
    """The settings that it began with."""
    first_step: int
    """Step from which it was in force."""
    snapshot: Optional[str]
    """Checkpoint, relative to the `wys` folder, of the moment before; the first entry of a captured scene has none."""


class History:
    """The entries of a run. They are part of its checkpoints; `history.json` is for people.

    Args:
        folder: The run's `wys` folder.
        entries: As of `data`.
    """

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]] = ()) -> None:
        self._folder = folder
        self.entries = [HistoryEntry(**entry) for entry in entries]

    def data(self) -> list[dict[str, Any]]:
        """The entries as plain data, oldest first."""
        return [asdict(entry) for entry in self.entries]

    def add(
        self,
        instruction: str,
        start: ApplyMode,
        settings: dict[str, Any],
        first_step: int,
        before: Optional[dict[str, Any]],
    ) -> None:
        """Appends an entry.

        Args:
            instruction: As in `HistoryEntry`.
            start: As in `HistoryEntry`.
            settings: As in `HistoryEntry`.
            first_step: As in `HistoryEntry`.
            before: A checkpoint of the moment before; it is kept as the entry's snapshot.
        """
        snapshot = None
        if before is not None:
            snapshot = f"{SNAPSHOTS}/{len(self.entries):03d}.ckpt"
            main_process_only(write_tensors)(self._folder / snapshot, before)
        self.entries.append(HistoryEntry(instruction, start, settings, first_step, snapshot))

    def last_snapshot(self) -> dict[str, Any]:
        """The checkpoint from before the last entry.

        Raises:
            WysError: If there is none, or it cannot be read.
        """
        if self.entries[-1].snapshot is None:
            raise WysError("There is nothing to undo: nothing was applied since the run began. Reset returns to the "
                           "captured scene.")  # fmt: skip
        path = self._folder / self.entries[-1].snapshot
        try:
            return read_checkpoint(path)
        except WysError as error:
            raise WysError(f'The snapshot "{path}" cannot be read, so this cannot be undone.') from error

    def drop_last(self) -> None:
        """Removes the last entry; its snapshot stays until `prune`."""
        self.entries.pop()

    @main_process_only
    def write(self) -> None:
        """Writes `history.json`."""
        write_json(self._folder / HISTORY_FILE, self.data())

    @main_process_only
    def prune(self) -> None:
        """Removes the snapshots that no entry names, once no checkpoint needs them."""
        kept = {entry.snapshot for entry in self.entries}
        for path in (self._folder / SNAPSHOTS).glob("*.ckpt"):
            if f"{SNAPSHOTS}/{path.name}" not in kept:
                path.unlink()
