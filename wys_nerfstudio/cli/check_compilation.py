"""Break-even of `--pipeline.compile-editor`: seconds of compilation against the seconds that it saves per edit."""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from wys_nerfstudio.cli.check_editor import STEPS, mean_steps, memory_errors, time_edit
from wys_nerfstudio.cli.check_machine import NOT_DOWNLOADED, editor_place
from wys_nerfstudio.cli.check_table import Table
from wys_nerfstudio.cli.check_training import num_edits
from wys_nerfstudio.editing import Editor, load_editor
from wys_nerfstudio.editing.compilation import check_compiler, compile_editor
from wys_nerfstudio.editing.loading import Precision
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.utils.errors import WysError

REPEATS = 5
"""Measured edits with and without compilation."""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable with the folder of compiled code."""


def measure_compiled(name: str, device: torch.device, precision: Precision, options: WysPipelineConfig) -> Table:
    """Measure edits before and after compilation, and the compilation itself, with an empty cache of compiled code.

    Args:
        name: The editor's name.
        device: Its device.
        precision: Its precision.
        options: Options of the method whose edits are made.

    Returns:
        A table with the number of edits after which compilation pays.
    """
    if editor_place(name) is None:
        return {"speed": f"not measured: {NOT_DOWNLOADED}"}
    try:
        with memory_errors(device), _empty_cache():
            check_compiler(device)
            editor = load_editor(name, device, precision)
            compile_editor(editor, cuda_graphs=True)
            began = time.perf_counter()
            time_edit(editor, options)
            first = time.perf_counter() - began
            plain, compiled, coding = _seconds_per_step(editor, options)
    except WysError as error:
        return {"speed": f"not measured: {error}"}
    steps = mean_steps(editor, options)
    compilation = first - STEPS * compiled - coding
    return break_even(steps * plain + coding, steps * compiled + coding, compilation, num_edits(options))


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Context in which torch finds no code of earlier compilations."""
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE_VARIABLE]
            else:
                os.environ[CACHE_VARIABLE] = before


def _seconds_per_step(editor: Editor, options: WysPipelineConfig) -> tuple[float, float, float]:
    """Return the median seconds of a diffusion step without and with compilation, measured alternately, and of encoding and
    decoding, which are not compiled."""
    plain, compiled = [], []
    for _ in range(REPEATS):
        with torch.compiler.set_stance("force_eager"):
            plain.append(time_edit(editor, options))
        compiled.append(time_edit(editor, options))
    step, compiled_step = (median(step for step, _ in times) for times in (plain, compiled))
    return step, compiled_step, median(coding for _, coding in plain + compiled)


def break_even(plain: float, compiled: float, compilation: float, edits: int) -> Table:
    """Return when compilation pays.

    Args:
        plain: Seconds of an edit.
        compiled: Seconds of a compiled edit.
        compilation: Seconds that compilation takes.
        edits: Edits of a run.
    """
    pays = f"after {math.ceil(compilation / (plain - compiled))} edits" if compiled < plain else "never"
    return {
        "compilation, s": compilation,
        "edit, s": plain,
        "compiled edit, s": compiled,
        "speedup": plain / compiled,
        "pays": f"{pays} (a run has {edits})",
    }
