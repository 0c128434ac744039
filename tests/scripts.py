"""nerfstudio's scripts in processes of their own, each a fork of one that has imported nerfstudio: that takes longer than most
of these runs do.
"""

import atexit
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

SECONDS = 600
"""After which a script is taken to hang."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["nerfstudio.scripts.train", "nerfstudio.scripts.render", "nerfstudio.scripts.exporter"])


def run_script(module: str, arguments: Sequence[str], folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs one of nerfstudio's scripts as its console script would.

    Args:
        module: Its name in `nerfstudio.scripts`.
        arguments: What is typed after the command.
        folder: Where it is typed; by default here.

    Returns:
        What it printed and came to.
    """
    with tempfile.TemporaryDirectory() as name:
        printed = [Path(name, stream) for stream in ("out", "err")]
        process = _forks.Process(target=_run, args=(module, arguments, folder, dict(os.environ), printed))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{module} {arguments} takes more than {SECONDS} s.")
        out, err = (path.read_text("utf8") for path in printed)
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, out, err)


def _run(
    module: str, arguments: Sequence[str], folder: Path | None, environment: dict[str, str], printed: list[Path]
) -> None:
    for descriptor, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", encoding="utf8", closefd=False) for descriptor in (1, 2))
    warnings.simplefilter("ignore")
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    sys.argv = [module, *arguments]
    try:
        importlib.import_module(f"nerfstudio.scripts.{module}").entrypoint()
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
