"""Time that the plugin adds to the start of nerfstudio's commands.

Each command runs in a child process, alternately with the plugin and without: without, the package's entry points are removed from
what importlib.metadata lists. Times are medians of the CPU seconds of whole processes.

    python tests/benchmarks/startup.py
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tyro

LIMIT = 0.3
"""Maximum number of seconds that the plugin may add."""
COMMANDS = (["--help"], ["nerfacto", "--help"])

CHILD = """
import importlib.metadata, sys
if sys.argv.pop(1) == "without":
    listed = importlib.metadata.entry_points
    def without_plugin(**query):
        found = listed(**query)
        if query != {"group": "nerfstudio.method_configs"}:
            return found
        return importlib.metadata.EntryPoints(p for p in found if not p.value.startswith("wys_nerfstudio"))
    importlib.metadata.entry_points = without_plugin
sys.argv[0] = "ns-train"
try:
    from nerfstudio.scripts.train import entrypoint
    entrypoint()
finally:
    loaded = any(name.split(".")[0] == "wys_nerfstudio" for name in sys.modules)
    heavy = [name for name in ("diffusers", "transformers") if name in sys.modules]
    print("LOADED", loaded, *heavy, file=sys.stderr)
"""


@dataclass
class Options:
    """Options of the benchmark."""

    repeats: int = 5
    """Measured runs of each command."""
    output: Path = Path("startup.json")
    """JSON file to write; the table is also printed as Markdown."""


def seconds_of(arguments: list[str], plugin: str) -> float:
    """Return the CPU seconds of one command.

    Args:
        arguments: Arguments of ns-train.
        plugin: "with" or "without".
    """
    command = [sys.executable, "-W", "ignore", "-c", CHILD, plugin, *arguments]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    assert done.stderr.splitlines()[-1] == f"LOADED {plugin == 'with'}", done.stderr
    assert ("wys-tiny" in done.stdout) == (plugin == "with" and arguments == ["--help"])
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(options: Options) -> None:
    """Measure, print the table and write the JSON file."""
    rows: list[dict[str, Any]] = []
    for arguments in COMMANDS:
        times: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(options.repeats):
            for plugin, seconds in times.items():
                seconds.append(seconds_of(arguments, plugin))
        row = {plugin: (min(t), statistics.median(t), max(t)) for plugin, t in times.items()}
        rows.append({"command": " ".join(["ns-train", *arguments]), **row, "added": row["with"][1] - row["without"][1]})
    print("| command, CPU seconds | without the plugin | with it | added |\n|---|---|---|---|")
    for row in rows:
        cells = (f"{t[1]:.2f} ({t[0]:.2f} to {t[2]:.2f})" for t in (row["without"], row["with"]))
        print(f"| `{row['command']}` | {' | '.join(cells)} | {row['added']:.2f} (at most {LIMIT}) |")
    about = {"date": date.today().isoformat(), "hardware": platform.machine(), "python": platform.python_version()}
    options.output.write_text(json.dumps(about | {"rows": rows}, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
