"""The instructions applied to a scene, with a snapshot from before each for Undo; kept in the run's `wys` folder."""

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
"""The run's first instruction, one on top of the current scene, one on the captured scene, or a reset to that scene."""


@dataclass(frozen=True)
class HistoryEntry:
    """One change of what is applied to the scene."""

    instruction: str
    """The instruction; for a reset, the one that was applied before."""
    start: ApplyMode
    """What it started from."""
    settings: dict[str, Any]
    """The settings at that moment."""
    first_step: int
    """First step under this entry."""
    snapshot: Optional[str]
    """Checkpoint from the moment before, relative to the `wys` folder; None for the first entry of a captured scene."""


def in_force(entries: Sequence[HistoryEntry]) -> list[HistoryEntry]:
    """Return the entries whose edits the scene shows, oldest first; none after a reset.

    Args:
        entries: All entries, oldest first.
    """
    shown: list[HistoryEntry] = []
    for entry in entries:
        if entry.start != "on top":
            shown = []
        if entry.start != "reset":
            shown.append(entry)
    return shown


class History:
    """Entries of a run. They are part of its checkpoints; `history.json` is a readable copy.

    Args:
        folder: The run's `wys` folder.
        size: Number of snapshots that are kept, those of the newest entries.
        entries: Result of `data`.
    """

    def __init__(self, folder: Path, size: int, entries: Sequence[dict[str, Any]] = ()) -> None:
        self._folder, self._size = folder, size
        self.entries = [HistoryEntry(**entry) for entry in entries]

    def data(self) -> list[dict[str, Any]]:
        """Return the entries as plain data, oldest first."""
        return [asdict(entry) for entry in self.entries]

    def add(
        self,
        instruction: str,
        start: ApplyMode,
        settings: dict[str, Any],
        first_step: int,
        before: Optional[dict[str, Any]],
    ) -> None:
        """Append an entry and save its snapshot.

        Args:
            instruction: As in `HistoryEntry`.
            start: As in `HistoryEntry`.
            settings: As in `HistoryEntry`.
            first_step: As in `HistoryEntry`.
            before: Checkpoint from the moment before.
        """
        snapshot = None
        if before is not None:
            snapshot = f"{SNAPSHOTS}/{len(self.entries):03d}.ckpt"
            main_process_only(write_tensors)(self._folder / snapshot, before)
        self.entries.append(HistoryEntry(instruction, start, settings, first_step, snapshot))

    def last_snapshot(self) -> dict[str, Any]:
        """Return the checkpoint from before the last entry.

        Raises:
            WysError: If there is none, or it cannot be read.
        """
        if self.entries[-1].snapshot is None:
            raise WysError(
                "There is nothing to undo: no instruction was applied since the run began. Reset returns to the captured "
                "scene."
            )
        path = self._folder / self.entries[-1].snapshot
        if not path.is_file():
            raise WysError(
                f'This cannot be undone: there is no "{path}" any more. The newest {self._size} snapshots are kept '
                "(--pipeline.history-size). Reset returns to the captured scene."
            )
        try:
            return read_checkpoint(path)
        except WysError as error:
            raise WysError(f'The snapshot "{path}" cannot be read, so this cannot be undone.') from error

    def drop_last(self) -> None:
        """Remove the last entry; `prune` removes its snapshot."""
        self.entries.pop()

    @main_process_only
    def write(self) -> None:
        """Write `history.json`."""
        write_json(self._folder / HISTORY_FILE, self.data())

    @main_process_only
    def prune(self) -> None:
        """Remove snapshots without an entry and those of old entries, once no checkpoint needs them."""
        kept = {entry.snapshot for entry in self.entries[-self._size :]}
        for path in find_snapshots(self._folder):
            if f"{SNAPSHOTS}/{path.name}" not in kept:
                path.unlink()


def find_snapshots(folder: Path) -> list[Path]:
    """Return the files of all snapshots in a run's `wys` folder, oldest first."""
    return sorted(path for path in (folder / SNAPSHOTS).glob("*.ckpt") if path.stem.isdecimal())
