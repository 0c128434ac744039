"""`wys check`: what this machine can do, as tables to paste into an issue."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from wys_nerfstudio.cli.check_table import Table, format_table, without_home
from wys_nerfstudio.cli.edit_image import check_device
from wys_nerfstudio.editing.loading import Precision, editor_source
from wys_nerfstudio.utils.atomic_io import write_json
from wys_nerfstudio.utils.errors import WysError


@dataclass
class Check:
    """Report what this machine can do: versions, files that are found, speed and memory of editor and training, and the
    estimated time of a run. Downloads nothing; paste its output into an issue."""

    editor: str | None = None
    """A hub id, a local folder in diffusers format, or an embedded editor; by default that of the recommended method."""
    device: str | None = None
    """Device of editor and scene, for example cuda:1; by default the GPU if there is one, else the CPU."""
    editor_dtype: Precision = "auto"
    """Precision of the editor, which is compared with float32; auto is that of ns-train."""
    compile_editor: bool = False
    """Also measure an edit with `ns-train --pipeline.compile-editor True`, which takes minutes."""
    views: int = 100
    """Number of views of the run whose time is estimated."""
    json: Path | None = None
    """Write the tables to this JSON file, too."""

    def main(self) -> None:
        """Print the tables."""
        if self.views < 1:
            raise WysError(f"--views must be at least 1, not {self.views}.")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        if self.editor is not None:
            editor_source(self.editor)  # refuses names of nothing
        report: dict[str, Table] = {}
        self._write(report)  # an unwritable file is refused before anything is measured
        for title, table in self._tables(torch.device(device)):
            report[title] = without_home(table)
            print(format_table(title, report[title]), flush=True)
        self._write(report)

    def _write(self, report: dict[str, Table]) -> None:
        if self.json is None:
            return
        try:
            write_json(self.json, report)
        except OSError as error:
            raise WysError(f'"{self.json}" cannot be written ({error.strerror}): give --json another file.') from error

    def _tables(self, device: torch.device) -> Iterator[tuple[str, Table]]:
        # Here: the other commands need not wait for these imports.
        from wys_nerfstudio.cli import check_machine
        from wys_nerfstudio.cli.check_compilation import measure_compiled
        from wys_nerfstudio.cli.check_editor import measure_editor
        from wys_nerfstudio.cli.check_training import estimate_run, measure_training

        config = check_machine.recommended_config(device)
        editor = self.editor or config.pipeline.editor
        yield "Installation", check_machine.versions()
        yield "Device", check_machine.device_table(device, str(config.method_name))
        yield "Files", check_machine.files(editor, str(config.pipeline.clip_model))
        _report("Measuring the editor ...")
        table, editing = measure_editor(editor, device, self.editor_dtype, config.pipeline)
        yield "Editor", table
        _report("Measuring training ...")
        table, training = measure_training(config, device)
        yield "Training on random rays", table
        if self.compile_editor:
            _report("Compiling the editor ...")
            yield "Compiled editor", measure_compiled(editor, device, self.editor_dtype, config.pipeline)
        yield f"Estimated minutes of a run on {self.views} views", estimate_run(config, self.views, editing, training)


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
