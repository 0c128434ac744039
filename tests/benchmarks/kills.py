"""Kills a short run at seeded moments, resumes it with the same command, and compares what comes of it, bit for bit.

    python tests/benchmarks/kills.py --kills 200 --output /tmp/kills

The run has every phase, and an instruction that is applied on top. Moments are of two kinds: events (a step begins or ends,
the editor's network is asked, a file is half written, is written but not in its place, has just been put there) and, for
every fourth kill, a moment of the clock. A third of the runs are killed again after they were resumed. All runs are forks
of one process that has imported everything, and go through nerfstudio's own entry point.
"""

import argparse
import json
import os
import random
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).parent.parent))

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process must not inherit torch's threads

import torch
import torchmetrics.image  # noqa: F401  as the editor below: once, for all forks
from conftest import build_editor_folder, write_ring_scene
from nerfstudio.scripts import train

from wys_nerfstudio.editing import load_editor
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.pipeline import WysPipeline
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.checkpoint import read_checkpoint
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.viewer.panel import ON_TOP, ViewerCommand

APPLIED_AT = 13
"""The step after which another instruction is applied on top."""
OPTIONS = [
    "--vis=tensorboard",
    "--machine.device-type=cpu",
    "--steps-per-save=4",
    "--timestamp=run",
    "--instruction=make the ball blue",
    "--mask-threshold=0.3",
    "--pipeline.reconstruct-steps=6",
    "--pipeline.localize-steps=3",
    "--pipeline.edit-steps=6",
    "--pipeline.edit-every=2",
    "--pipeline.edit-count=2",
    "--pipeline.diffusion-steps=3",
    "--pipeline.relevance-num-samples=1",
    "--pipeline.model.num-nerf-samples-per-ray=4",
    "--pipeline.model.num-proposal-samples-per-ray=8",
    "--pipeline.model.log2-hashmap-size=10",
    "--pipeline.model.proposal-warmup=5",
    "--pipeline.datamanager.train-num-rays-per-batch=64",
    "--pipeline.datamanager.edit-num-rays-per-batch=64",
]


class Moments:
    """Counts the events of a run, and ends it at one of them.

    Args:
        log: File that the events, or the one of the kill, are written to.
        kill_at: Number of the event that the process is killed at.
    """

    def __init__(self, log: Path, kill_at: Optional[int] = None) -> None:
        self._log, self._kill_at = log, kill_at
        self.phase = "start"
        self._events: list[tuple[str, str]] = []

    def happens(self, what: str, at_kill: Callable[[], object] = lambda: None) -> None:
        """An event; `at_kill` is done if it is the last one."""
        self._events.append((self.phase, what))
        if len(self._events) - 1 == self._kill_at:
            at_kill()
            self.write([self._events[-1]])
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, events: Optional[list[tuple[str, str]]] = None) -> None:
        """Writes the log."""
        self._log.write_text(json.dumps(self._events if events is None else events))

    def install(self) -> None:
        """Puts events around what a run does."""
        fsync, replace, iteration, predict = (
            os.fsync,
            os.replace,
            WysTrainer.train_iteration,
            StableDiffusionEditor.predict_noise,
        )
        enter = WysPipeline.enter_phase

        def watched_fsync(descriptor: int) -> None:
            about = os.fstat(descriptor)
            if stat.S_ISREG(about.st_mode):
                self.happens("file half written", lambda: os.ftruncate(descriptor, about.st_size // 2))
            fsync(descriptor)

        def watched_replace(old: Path, new: Path) -> None:
            kind = {".ckpt": "checkpoint", ".png": "picture"}.get(Path(new).suffix, "other file")
            self.happens(f"{kind} written, not in its place")
            replace(old, new)
            self.happens(f"{kind} in its place")

        def watched_enter(pipeline: WysPipeline, phase: Phase) -> None:
            applied = pipeline.config.instruction != "make the ball blue"
            self.phase = f"{phase.value} (applied)" if applied else phase.value
            enter(pipeline, phase)

        def watched_iteration(trainer: WysTrainer, step: int):
            self.happens("step begins")
            result = iteration(trainer, step)
            self.happens("step ends")
            if step == APPLIED_AT:
                trainer.pipeline.panel.commands.put(ViewerCommand("apply", ON_TOP, "make the bear red"))
            return result

        def watched_predict(editor: StableDiffusionEditor, *arguments: Any, **named: Any) -> Any:
            self.happens("editor asked")
            return predict(editor, *arguments, **named)

        os.fsync, os.replace = watched_fsync, watched_replace  # type: ignore
        WysTrainer.train_iteration, StableDiffusionEditor.predict_noise = watched_iteration, watched_predict  # type: ignore
        WysPipeline.enter_phase = watched_enter  # type: ignore


def run(arguments: list[str], log: Path, kill_at: Optional[int] = None, kill_after: Optional[float] = None) -> int:
    """One run in a process of its own; returns its exit code, -9 if it was killed.

    Args:
        arguments: Of ns-train.
        log: File for its events and, with another ending, its output.
        kill_at: Number of the event to kill it at.
        kill_after: Seconds after which to kill it.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.with_suffix(".txt").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            moments = Moments(log, kill_at)
            moments.install()
            sys.argv = ["ns-train", *arguments]
            train.entrypoint()
            moments.write()
            code = 0
        except SystemExit as error:
            print(error.code)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def different(first: Any, second: Any, where: str = "") -> list[str]:
    """Names of the entries in which two checkpoints differ."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) and first.dtype == second.dtype else [where]
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [name for key in first for name in different(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, (list, tuple)) and type(first) is type(second) and len(first) == len(second):
        return [name for i, pair in enumerate(zip(first, second)) for name in different(*pair, f"{where}/{i}")]
    return [] if first == second and type(first) is type(second) else [where]


def contents(run_folder: Path) -> dict[str, Any]:
    """Everything that a run leaves and that must be the same: files by name, and as what they hold."""
    found: dict[str, Any] = {}
    paths = [*run_folder.glob("nerfstudio_models/*"), *run_folder.glob("wys/**/*")]
    for path in (path for path in paths if path.is_file() and not path.name.endswith(".partial")):
        name = str(path.relative_to(run_folder))
        if path.suffix == ".ckpt":
            found[name] = read_checkpoint(path)
        elif path.name == "edits.jsonl":
            found[name] = [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def main() -> None:
    """Kills, resumes, compares and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this many")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    output, draw = options.output, random.Random(options.seed)
    scene = write_ring_scene(output / "scene", width=24, height=20, views=4)
    editor = build_editor_folder(output / "editor")
    load_editor(str(editor))
    start = ["wys-tiny", "--data", str(scene), "--editor", str(editor), *OPTIONS]

    began = time.monotonic()
    assert run([*start, "--output-dir", str(output / "whole")], output / "whole.json") == 0
    seconds = time.monotonic() - began
    (whole,) = output.glob("whole/*/*/run")
    wanted, events = contents(whole), json.loads((output / "whole.json").read_text())
    kinds = sorted({tuple(event) for event in events})
    print(f"uninterrupted: {seconds:.1f} s, {len(events)} events of {len(kinds)} kinds", flush=True)

    table: dict[tuple[str, str], Counter[str]] = {}
    kills, case = 0, 0
    while kills < options.kills and time.monotonic() - began < 60 * options.minutes:
        folder, log = output / f"case-{case:03d}", output / f"case-{case:03d}.json"
        command = [*start, "--output-dir", str(folder)]
        moments: list[tuple[str, str]] = []
        wanted_kills = 2 if case % 3 == 2 else 1
        while len(moments) < wanted_kills:
            if case % 4 == 3:
                code = run(command, log, kill_after=draw.uniform(0.1, 1.0) * seconds)
                moment = ("any", "moment of the clock")
            else:
                # Kinds are drawn, not events: most events are pictures.
                kind = draw.choice(kinds)
                number = draw.choice([i for i, event in enumerate(events) if tuple(event) == kind])
                code = run(command, log, kill_at=number if not moments else draw.randrange(len(events) // 4))
                moment = tuple(json.loads(log.read_text())[-1])
            if code == 0:
                break
            assert code == -signal.SIGKILL, log.with_suffix(".txt").read_text()
            moments.append(moment)
            checkpoints = list(folder.glob("*/*/run/nerfstudio_models"))
            command = [*start, "--output-dir", str(folder)]
            command += [option for path in checkpoints if any(path.iterdir()) for option in ("--load-dir", str(path))]
        else:
            code = run(command, log)
        text = log.with_suffix(".txt").read_text()
        assert code == 0 or "The run is through" in text, text
        (resumed,) = folder.glob("*/*/run")
        wrong = different(wanted, contents(resumed))
        for moment in moments:
            row = table.setdefault(moment, Counter())
            row["kills"] += 1
            row["equal"] += not wrong
        kills, case = kills + len(moments), case + 1
        if wrong:
            print(f"{folder}: killed at {moments}, differs in {wrong[:5]} and {len(wrong)} in all", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"{'phase':22} {'moment':36} kills  resumed equal")
    for (phase, what), row in sorted(table.items()):
        print(f"{phase:22} {what:36} {row['kills']:5}  {row['equal']:5}")
    equal = sum(row["equal"] for row in table.values())
    print(f"{'all':22} {'':36} {kills:5}  {equal:5}")
    raise SystemExit(0 if equal == kills else 1)


if __name__ == "__main__":
    main()
