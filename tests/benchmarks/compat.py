"""Compatibility with old and new versions of Python and dependencies: install, import, train and test in new environments.

    pip install uv && python tests/benchmarks/compat.py --output /tmp/compat

Each row of `ROWS` is an environment of its own, into which a wheel of the package is installed; it is removed afterwards. uv finds
the interpreters on the PATH. Finished rows are skipped, so an interrupted run can be resumed. The result is a Markdown table, in
which a cell is "yes" or the line of the output that gives the reason of the failure.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).parent.parent.parent
TESTS = [
    "relevance/test_maps",
    "training/test_schedule",
    "editing/test_sampling",
    "editing/test_local_edit",
    "training/test_checkpoint",
]
"""Tests to run: mathematics, editor and checkpoints, without tests that take minutes."""
TEST_TOOLS = ["pytest", "pytest-xdist", "hypothesis", "beartype"]
PACKAGES = ["torch", "diffusers", "transformers", "numpy"]
"""Packages whose versions the table shows."""


def oldest() -> list[str]:
    """Return the lower bounds in pyproject.toml as pins, and the oldest supported numpy."""
    bounds = re.findall(r'"(\w[\w-]*)>=([\d.]+)",', (ROOT / "pyproject.toml").read_text().split("[project.optional")[0])
    return [f"{name}=={version}" for name, version in bounds if name != "setuptools"] + ["numpy==1.26.*"]


@dataclass(frozen=True)
class Row:
    """An environment."""

    name: str
    """Name of the environment."""
    python: str
    """Version of Python."""
    pins: tuple[str, ...] = ()
    """Requirements in addition to the package's own."""


ROWS = [
    Row("3.10-oldest", "3.10", tuple(oldest())),
    Row("3.10-newest", "3.10"),
    Row("3.11-newest", "3.11"),
    Row("3.11-numpy-1", "3.11", ("numpy<2",)),
    Row("3.12-newest", "3.12"),
    Row("3.12-numpy-2", "3.12", ("numpy>=2",)),
    Row("3.13-newest", "3.13"),
]
SHORT_RUN = (
    "wys demo-scene scene --width 32 --height 32 && ns-train wys-tiny --data scene --vis tensorboard --output-dir runs "
    '--instruction "turn the bear into a panda" --pipeline.reconstruct-steps 12 --pipeline.localize-steps 4 '
    "--pipeline.edit-steps 6 --pipeline.mask-threshold 0 && test -s runs/*/*/*/wys/edits.jsonl"
)
CHECKS = {
    "imports": 'python -c "import wys_nerfstudio.config, wys_nerfstudio.editing"',
    "`ns-train --help` lists it": "COLUMNS=200 ns-train --help | grep -w wys-tiny",
    "trains and edits": SHORT_RUN,
    "tests": f"pytest -q -p no:cacheprovider -c {ROOT}/pyproject.toml "
    + " ".join(f"{ROOT}/tests/{name}.py" for name in TESTS),
}
"""Shell commands to run in each environment, by column of the table."""


def failure_reason(text: str) -> str:
    """Return the line of an output that gives the reason of a failure: uv's first reason, or the last line with an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if "Because" in line]
    errors = [line for line in lines if re.search("error|failed", line, re.IGNORECASE)]
    return (reasons[:1] or errors[-1:] or lines[-1:] or ["no output"])[0][:200].replace("|", "/")


def run(command: str, folder: Path, log: Path, environment: Optional[Path] = None) -> tuple[bool, str]:
    """Run a shell command.

    Args:
        command: The command.
        folder: Working directory.
        log: File that command and output are appended to.
        environment: Virtual environment whose programs come first on the PATH.

    Returns:
        Whether the exit code is 0, and the output.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if environment is not None:
        variables |= {"VIRTUAL_ENV": str(environment), "PATH": f"{environment}/bin:{os.environ['PATH']}"}
    result = subprocess.run(
        command, shell=True, cwd=folder, env=variables, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with log.open("a") as file:
        file.write(f"$ {command}\n{result.stdout}\n")
    return result.returncode == 0, result.stdout


def check_environment(row: Row, wheel: Path, folder: Path) -> dict[str, str]:
    """Create an environment, run all checks in it, and remove it.

    Args:
        row: The environment.
        wheel: The package.
        folder: Empty folder for the environment and the files of the checks; a log stays in it.

    Returns:
        Cells of the table by column.
    """
    environment, log = folder / "environment", folder / "log.txt"
    requirements = " ".join(f"'{requirement}'" for requirement in [str(wheel), *row.pins, *TEST_TOOLS])
    install = f"uv venv -q --python {row.python} {environment} && uv pip install {requirements}"
    installed, text = run(install, folder, log, environment)
    cells = {"Python": row.python}
    if installed:
        code = f"import importlib.metadata as m; print(*(m.version(name) for name in {PACKAGES}))"
        versions = run(f'python -c "{code}"', folder, log, environment)[1].split()
        cells |= dict(zip(PACKAGES, versions))
    cells["installs"] = "yes" if installed else failure_reason(text)
    for column, command in CHECKS.items() if installed else ():
        passed, text = run(command, folder, log, environment)
        count = re.search(r"(\d+) passed", text)
        cells[column] = (count[0] if count else "yes") if passed else failure_reason(text)
        print(f"{row.name}: {column}: {cells[column]}", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    return cells


def table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table."""
    columns = ["Python", *PACKAGES, "installs", *CHECKS]
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Check the environments that have not been checked, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for environments, logs and the table")
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, help="environments to check")
    options = parser.parse_args()
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    built, text = run(f"uv build -q --wheel --out-dir {output}/wheel {ROOT}", output, output / "build.txt")
    if not built:
        raise SystemExit(failure_reason(text))
    (wheel,) = (output / "wheel").glob("*.whl")
    for row in (row for row in ROWS if row.name in options.rows and not (output / f"{row.name}.json").exists()):
        folder = output / row.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        cells = check_environment(row, wheel, folder)
        (output / f"{row.name}.json").write_text(json.dumps(cells, indent=1))
    finished = [path for path in (output / f"{row.name}.json" for row in ROWS) if path.exists()]
    (output / "table.md").write_text(table([json.loads(path.read_text()) for path in finished]))
    sys.stdout.write((output / "table.md").read_text())


if __name__ == "__main__":
    main()
