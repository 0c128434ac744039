"""Runs nerfstudio's scripts in child processes, forked from a process that has imported nerfstudio: the imports take longer than the
scripts.
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

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment variables of every script."""
TIMEOUT = 600
"""Maximum number of seconds of a script."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["nerfstudio.scripts.train", "nerfstudio.scripts.render", "nerfstudio.scripts.exporter"])


def run_script(
    module: str, arguments: Sequence[str], folder: Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run one of nerfstudio's scripts as its console script does.

    Args:
        module: Name of its module in `nerfstudio.scripts`.
        arguments: Command-line arguments.
        folder: Working directory. Default: the current one.
        variables: Further environment variables. With any, the script runs in a new process instead of a fork, because
            libraries may read them at import.

    Returns:
        Exit code and output.

    Raises:
        TimeoutError: After `TIMEOUT` seconds.
    """
    environment = {**os.environ, **ENVIRONMENT, **variables}
    if variables:
        command = [sys.executable, "-W", "ignore", "-m", f"nerfstudio.scripts.{module}", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name, stream) for stream in ("out", "err")]
        process = _forks.Process(target=_run, args=(module, arguments, folder, environment, outputs))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{module} {arguments} takes more than {TIMEOUT} s.")
        out, err = (path.read_text("utf8") for path in outputs)
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, out, err)


def _run(
    module: str, arguments: Sequence[str], folder: Path | None, environment: dict[str, str], outputs: list[Path]
) -> None:
    for descriptor, path in enumerate(outputs, 1):
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
        atexit._run_exitfuncs()  # processes of multiprocessing do not call them
