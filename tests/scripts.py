"""nerfstudio's scripts in processes of their own. Most are forks of one that has imported nerfstudio, which takes longer than these
runs do.
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

ALWAYS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Variables that every script is given."""
SECONDS = 600
"""After which a script is taken to hang."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["nerfstudio.scripts.train", "nerfstudio.scripts.render", "nerfstudio.scripts.exporter"])


def run_script(
    module: str, arguments: Sequence[str], folder: Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Runs one of nerfstudio's scripts as its console script would.

    Args:
        module: Its name in `nerfstudio.scripts`.
        arguments: What is typed after the command.
        folder: Where it is typed; by default here.
        variables: Environment variables beside those of here. Libraries may read them when they are imported, so with
            some of them the process is no fork.

    Returns:
        What it printed and came to.
    """
    environment = {**os.environ, **ALWAYS, **variables}
    if variables:
        fresh = [sys.executable, "-W", "ignore", "-m", f"nerfstudio.scripts.{module}", *arguments]
        return subprocess.run(
            fresh, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    with tempfile.TemporaryDirectory() as name:
        printed = [Path(name, stream) for stream in ("out", "err")]
        process = _forks.Process(target=_run, args=(module, arguments, folder, environment, printed))
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
