"""Installs the package in fresh environments, old and new, tries it there, and writes what came of it as a Markdown table.

    pip install uv && python tests/benchmarks/compat.py --output /tmp/compat

Each row of `ROWS` gets an environment of its own, from a wheel, which is removed afterwards; uv finds the interpreters on the
PATH. A row that has been tried is passed over, so a run that was stopped goes on where it was. In the table "yes" is what
passed; else there is the first line that says why not.
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
"""Tests that are run: of the mathematics, the editor and the files, without those that take minutes."""
TEST_TOOLS = ["pytest", "pytest-xdist", "hypothesis", "beartype"]
SHOWN = ["torch", "diffusers", "transformers", "numpy"]
"""Packages whose versions are in the table."""


def oldest() -> list[str]:
    """The lower bounds of pyproject.toml, as pins, and the oldest numpy that is meant to work."""
    bounds = re.findall(r'"(\w[\w-]*)>=([\d.]+)",', (ROOT / "pyproject.toml").read_text().split("[project.optional")[0])
    return [f"{name}=={version}" for name, version in bounds if name != "setuptools"] + ["numpy==1.26.*"]


@dataclass(frozen=True)
class Row:
    """An environment."""

    name: str
    python: str
    """Version of the interpreter."""
    pins: tuple[str, ...] = ()
    """Requirements beside the package's own."""


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
"""What is tried in each environment, by the table's heading."""


def why(text: str) -> str:
    """The line of an output that says what went wrong: uv's first reason, or the last line that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if "Because" in line]
    errors = [line for line in lines if re.search("error|failed", line, re.IGNORECASE)]
    return (reasons[:1] or errors[-1:] or lines[-1:] or ["no output"])[0][:200].replace("|", "/")


def run(command: str, folder: Path, log: Path, environment: Optional[Path] = None) -> tuple[bool, str]:
    """Runs a shell command in a folder, with an environment's programs first.

    Returns:
        Whether it ended with 0, and what it printed, which goes to the log, too.
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if environment is not None:
        variables |= {"VIRTUAL_ENV": str(environment), "PATH": f"{environment}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=variables, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with log.open("a") as file:
        file.write(f"$ {command}\n{done.stdout}\n")
    return done.returncode == 0, done.stdout


def attempt(row: Row, wheel: Path, folder: Path) -> dict[str, str]:
    """Makes the row's environment, tries everything in it, and removes it.

    Args:
        row: The environment.
        wheel: The package.
        folder: Empty folder for all that comes up; a log stays in it.
    """
    environment, log = folder / "environment", folder / "log.txt"
    requirements = " ".join(f"'{requirement}'" for requirement in [str(wheel), *row.pins, *TEST_TOOLS])
    install = f"uv venv -q --python {row.python} {environment} && uv pip install {requirements}"
    installed, text = run(install, folder, log, environment)
    cells = {"Python": row.python}
    if installed:
        code = f"import importlib.metadata as m; print(*(m.version(name) for name in {SHOWN}))"
        versions = run(f'python -c "{code}"', folder, log, environment)[1].split()
        cells |= dict(zip(SHOWN, versions))
    cells["installs"] = "yes" if installed else why(text)
    for heading, command in CHECKS.items() if installed else ():
        passed, text = run(command, folder, log, environment)
        count = re.search(r"(\d+) passed", text)
        cells[heading] = (count[0] if count else "yes") if passed else why(text)
        print(f"{row.name}: {heading}: {cells[heading]}", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    return cells


def table(rows: list[dict[str, str]]) -> str:
    """The Markdown table."""
    headings = ["Python", *SHOWN, "installs", *CHECKS]
    lines = [headings, ["---"] * len(headings), *([row.get(heading, "") for heading in headings] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Tries the rows that have not been tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    options = parser.parse_args()
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    built, text = run(f"uv build -q --wheel --out-dir {output}/wheel {ROOT}", output, output / "build.txt")
    if not built:
        raise SystemExit(why(text))
    (wheel,) = (output / "wheel").glob("*.whl")
    for row in (row for row in ROWS if row.name in options.rows and not (output / f"{row.name}.json").exists()):
        folder = output / row.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        cells = attempt(row, wheel, folder)
        (output / f"{row.name}.json").write_text(json.dumps(cells, indent=1))
    tried = [path for path in (output / f"{row.name}.json" for row in ROWS) if path.exists()]
    (output / "table.md").write_text(table([json.loads(path.read_text()) for path in tried]))
    sys.stdout.write((output / "table.md").read_text())


if __name__ == "__main__":
    main()
