"""Kill a short run at seeded moments, resume it with the same command, and compare the result bit for bit.

    python tests/benchmarks/kills.py --kills 200 --output /tmp/kills

The run has every phase, and an instruction that is applied on top. Three of four cases are killed at an event: a step begins or
ends, the editor's network is called, a file is half written, written but not renamed, or just renamed. Every fourth case is killed
at a random time. A third of the runs are killed a second time after they were resumed. All runs are forks of one process with all
imports done, and start at nerfstudio's own entry point.
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
import torchmetrics.image  # noqa: F401  imported once for all forks
from conftest import build_editor_folder, write_ring_scene
from nerfstudio.scripts import train

from wys_nerfstudio.editing import load_editor
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.checkpoint import read_checkpoint
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.training.session import EditSession
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


class EventLog:
    """Records the events of a run, and kills the process at one of them.

    Args:
        log: JSON file that the events are written to; after a kill, only the last one.
        kill_at: Index of the event at which the process is killed.
    """

    def __init__(self, log: Path, kill_at: Optional[int] = None) -> None:
        self._log, self._kill_at = log, kill_at
        self.phase = "start"
        self._events: list[tuple[str, str]] = []

    def record(self, event: str, before_kill: Callable[[], object] = lambda: None) -> None:
        """Record an event, and kill the process if it is the chosen one.

        Args:
            event: Kind of the event.
            before_kill: Called before the process is killed.
        """
        self._events.append((self.phase, event))
        if len(self._events) - 1 == self._kill_at:
            before_kill()
            self.write([self._events[-1]])
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, events: Optional[list[tuple[str, str]]] = None) -> None:
        """Write all recorded events, or other ones, to the log."""
        self._log.write_text(json.dumps(self._events if events is None else events))

    def install(self) -> None:
        """Patch the functions of a run so that they record events."""
        fsync, replace, iteration, predict = (
            os.fsync,
            os.replace,
            WysTrainer.train_iteration,
            StableDiffusionEditor.predict,
        )
        enter = EditSession.enter_phase

        def watched_fsync(descriptor: int) -> None:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                self.record("file half written", lambda: os.ftruncate(descriptor, status.st_size // 2))
            fsync(descriptor)

        def watched_replace(old: Path, new: Path) -> None:
            kind = {".ckpt": "checkpoint", ".png": "image"}.get(Path(new).suffix, "other file")
            self.record(f"{kind} written, not renamed")
            replace(old, new)
            self.record(f"{kind} renamed")

        def watched_enter(session: EditSession, phase: Phase) -> None:
            applied = session.settings.current.instruction != "make the ball blue"
            self.phase = f"{phase.value} (applied)" if applied else phase.value
            enter(session, phase)

        def watched_iteration(trainer: WysTrainer, step: int):
            self.record("step begins")
            result = iteration(trainer, step)
            self.record("step ends")
            if step == APPLIED_AT:
                trainer.pipeline.panel.commands.put(ViewerCommand("apply", ON_TOP, "make the bear red"))
            return result

        def watched_predict(editor: StableDiffusionEditor, *arguments: Any, **named: Any) -> Any:
            self.record("editor called")
            return predict(editor, *arguments, **named)

        os.fsync, os.replace = watched_fsync, watched_replace  # type: ignore
        WysTrainer.train_iteration, StableDiffusionEditor.predict = watched_iteration, watched_predict  # type: ignore
        EditSession.enter_phase = watched_enter  # type: ignore


def run(arguments: list[str], log: Path, kill_at: Optional[int] = None, kill_after: Optional[float] = None) -> int:
    """Run ns-train in a forked process.

    Args:
        arguments: Arguments of ns-train.
        log: JSON file for the events; the output goes to a .txt file beside it.
        kill_at: Index of the event at which to kill the run.
        kill_after: Seconds after which to kill the run.

    Returns:
        Exit code, -9 if the run was killed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.with_suffix(".txt").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            event_log = EventLog(log, kill_at)
            event_log.install()
            sys.argv = ["ns-train", *arguments]
            train.entrypoint()
            event_log.write()
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


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Return the names of the entries in which two nested values differ.

    Args:
        first: Containers of tensors and plain data.
        second: The same.
        where: Name of the two values.
    """
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) and first.dtype == second.dtype else [where]
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [name for key in first for name in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, (list, tuple)) and type(first) is type(second) and len(first) == len(second):
        return [name for i, pair in enumerate(zip(first, second)) for name in differences(*pair, f"{where}/{i}")]
    return [] if first == second and type(first) is type(second) else [where]


def contents(run_folder: Path) -> dict[str, Any]:
    """Return all files of a run that must be reproduced, parsed where their bytes may differ, by relative path."""
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
    """Kill, resume and compare runs, and print a table. The exit code is 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="minimum number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this many minutes")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and logs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output, rng = options.output, random.Random(options.seed)
    scene = write_ring_scene(output / "scene", width=24, height=20, views=4)
    editor = build_editor_folder(output / "editor")
    load_editor(str(editor))
    start = ["wys-tiny", "--data", str(scene), "--editor", str(editor), *OPTIONS]

    started = time.monotonic()
    assert run([*start, "--output-dir", str(output / "whole")], output / "whole.json") == 0
    seconds = time.monotonic() - started
    (whole,) = output.glob("whole/*/*/run")
    expected, events = contents(whole), json.loads((output / "whole.json").read_text())
    kinds = sorted({tuple(event) for event in events})
    print(f"uninterrupted: {seconds:.1f} s, {len(events)} events of {len(kinds)} kinds", flush=True)

    table: dict[tuple[str, str], Counter[str]] = {}
    kills, case = 0, 0
    while kills < options.kills and time.monotonic() - started < 60 * options.minutes:
        folder, log = output / f"case-{case:03d}", output / f"case-{case:03d}.json"
        command = [*start, "--output-dir", str(folder)]
        moments: list[tuple[str, str]] = []
        kills_of_case, at_random = 2 if case % 3 == 2 else 1, case % 4 == 3
        while len(moments) < kills_of_case:
            if at_random:
                code = run(command, log, kill_after=rng.uniform(0.1, 1.0) * seconds)
            else:
                # Sample a kind first, then an event of it: most events are image files.
                kind = rng.choice(kinds)
                number = rng.choice([i for i, event in enumerate(events) if tuple(event) == kind])
                code = run(command, log, kill_at=number if not moments else rng.randrange(len(events) // 4))
            if code != -signal.SIGKILL:
                break  # it ended before that moment
            moments.append(("any", "random time") if at_random else tuple(json.loads(log.read_text())[-1]))
            for captured in folder.glob("*/*/run/wys/captured.ckpt"):
                if not any(captured.parent.parent.glob("nerfstudio_models/*")):
                    # A run does not replace this scene; without a checkpoint only its folder's removal starts it again.
                    shutil.rmtree(captured.parent.parent)
            checkpoints = list(folder.glob("*/*/run/nerfstudio_models"))
            command = [*start, "--output-dir", str(folder)]
            command += [option for path in checkpoints if any(path.iterdir()) for option in ("--load-dir", str(path))]
        else:
            code = run(command, log)
        text = log.with_suffix(".txt").read_text()
        assert code == 0 or "The run is finished" in text, text
        (resumed,) = folder.glob("*/*/run")
        different = differences(expected, contents(resumed))
        for moment in moments:
            row = table.setdefault(moment, Counter())
            row["kills"] += 1
            row["equal"] += not different
        kills, case = kills + len(moments), case + 1
        if different:
            print(f"{folder}: killed at {moments}; {len(different)} entries differ: {different[:5]} ...", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"{'phase':22} {'moment':36} kills  equal")
    for (phase, what), row in sorted(table.items()):
        print(f"{phase:22} {what:36} {row['kills']:5}  {row['equal']:5}")
    equal = sum(row["equal"] for row in table.values())
    print(f"{'all':22} {'':36} {kills:5}  {equal:5}")
    raise SystemExit(0 if equal == kills else 1)


if __name__ == "__main__":
    main()
