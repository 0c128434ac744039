"""A long run whose viewer is visited all the time: does its memory grow, do threads or open files pile up?

    python tests/benchmarks/soak.py --output /tmp/soak

`ns-train wys-tiny` runs in a process of its own on a small scene. Viewers come and go: each is a websocket client that speaks
viser's protocol, as the browser's page does. It looks at the scene until a picture arrives, then by turns applies another
instruction, or takes that back and lets training go on, and leaves, every fourth time without a goodbye. Memory, threads and
open files are those of the run's process, as the system counts them. Leaves `soak.json` and `soak.png`, and exits with 1 if
anything grew after warm-up.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack
import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import build_editor_folder, write_ring_scene

RECONSTRUCT, LOCALIZE = 30, 10
"""Steps of the first two phases."""
OPTIONS = [
    "--vis=viewer",
    "--machine.device-type=cpu",
    "--steps-per-save=50",
    "--timestamp=run",
    "--instruction=make the ball blue",
    "--mask-threshold=0.3",
    f"--pipeline.reconstruct-steps={RECONSTRUCT}",
    f"--pipeline.localize-steps={LOCALIZE}",
    "--pipeline.edit-every=10",
    "--pipeline.edit-count=1",
    "--pipeline.diffusion-steps=3",
    "--pipeline.relevance-num-samples=1",
    "--pipeline.model.num-nerf-samples-per-ray=8",
    "--pipeline.model.num-proposal-samples-per-ray=16",
    "--pipeline.model.log2-hashmap-size=12",
    "--pipeline.datamanager.train-num-rays-per-batch=256",
    "--pipeline.datamanager.edit-num-rays-per-batch=128",
]
WARM_UP = 0.25
"""Share of the steps after which growth counts."""
MEMORY_GROWTH = 0.05
"""Growth of resident memory that is taken as none."""


@dataclass(frozen=True)
class Sample:
    """What the run's process holds at a step."""

    step: int
    memory: float
    """Resident, in MiB."""
    threads: int
    files: int
    """Open file descriptors, sockets included."""


@dataclass(frozen=True)
class Growth:
    """Medians of the first and the last third of the samples after warm-up."""

    first: Sample
    last: Sample

    @property
    def memory(self) -> float:
        """Share by which resident memory grew."""
        return self.last.memory / self.first.memory - 1

    def complaints(self) -> list[str]:
        """What grew; nothing if all is well."""
        found = []
        if self.memory >= MEMORY_GROWTH:
            found.append(f"resident memory grew by {100 * self.memory:.1f} % after warm-up")
        for name in ("threads", "files"):
            before, after = getattr(self.first, name), getattr(self.last, name)
            if after > before:
                found.append(f"{name} grew from {before} to {after} after warm-up")
        return found


def growth(samples: Sequence[Sample]) -> Growth:
    """Compares the beginning and the end of what is left after warm-up; whole thirds, because phases need more or less."""
    warm = [sample for sample in samples if sample.step >= WARM_UP * samples[-1].step]
    third = len(warm) // 3

    def middle(part: Sequence[Sample]) -> Sample:
        columns = zip(*(asdict(sample).values() for sample in part))
        step, memory, threads, files = map(statistics.median_low, columns)
        return Sample(step, memory, threads, files)

    return Growth(middle(warm[:third]), middle(warm[-third:]))


class Client:
    """A viewer's connection; keeps what the panel shows.

    Args:
        port: Of the viewer.
    """

    def __init__(self, port: int) -> None:
        self._connection = connect(f"ws://127.0.0.1:{port}", max_size=None).__enter__()  # until `leave`
        self._elements: dict[str, dict[str, Any]] = {}
        self.pictures = 0
        """How many pictures of the scene have arrived."""
        self.status = ""
        """The panel's status line."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for packed in self._connection:
                for message in msgpack.unpackb(packed):  # type: ignore
                    self._take(message)
        except ConnectionClosed:
            pass

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"].startswith("GuiAdd"):
            self._elements[message["id"]] = message
        elif message["type"] == "GuiUpdateMessage" and message["id"] in self._elements:
            self._elements[message["id"]].update(message["updates"])
        self.pictures += message["type"] == "BackgroundImageMessage"
        text = message.get("updates", message).get("markdown") or ""
        if text.startswith("**"):
            self.status = text

    def _element(self, label: str) -> dict[str, Any]:
        (found,) = [e for e in self._elements.copy().values() if (e.get("label") or "").strip() == label]
        return found

    def value(self, label: str) -> Any:
        """What an element of the panel holds."""
        return self._element(label)["value"]

    def send(self, kind: str, **fields: Any) -> None:
        """Sends a message of viser's."""
        self._connection.send(msgpack.packb({"type": kind, **fields}))

    def set(self, label: str, value: Any) -> None:
        """Changes an element of the panel, or clicks a button."""
        self.send("GuiUpdateMessage", id=self._element(label)["id"], updates={"value": value})

    def look_from(self, position: Sequence[float]) -> None:
        """Moves the camera; after the first time viser counts this as a client, and nerfstudio draws for it."""
        self.send(
            "ViewerCameraMessage",
            wxyz=(0.5, 0.5, -0.5, -0.5),
            position=position,
            fov=0.8,
            aspect=1.25,
            look_at=(0.0, 0.0, 0.0),
            up_direction=(0.0, 0.0, 1.0),
        )

    def leave(self, goodbye: bool = True) -> None:
        """Ends the connection, or just drops it."""
        if goodbye:
            self._connection.close()
        else:
            self._connection.socket.shutdown(socket.SHUT_RDWR)


class Run:
    """ns-train in a process of its own, with a listener that looks at nothing and samples the process whenever the status
    tells another step.

    Args:
        folder: Where everything goes.
        steps: Steps that the run has by itself; what is applied adds to them.
        seconds: How long anything may take to happen.
    """

    def __init__(self, folder: Path, steps: int, seconds: float = 300) -> None:
        self._seconds = seconds
        scene = write_ring_scene(folder / "scene")
        editor = build_editor_folder(folder / "editor")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        arguments = ["wys-tiny", "--data", scene, "--editor", editor, "--output-dir", folder / "runs", *OPTIONS]
        arguments += [f"--viewer.websocket-port={self.port}"]
        arguments += [f"--pipeline.edit-steps={steps - RECONSTRUCT - LOCALIZE}"]
        self.log = folder / "log.txt"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "nerfstudio.scripts.train", *map(str, arguments)],
                stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        self._history = folder / "runs" / "scene" / "wys-tiny" / "run" / "wys" / "history.json"
        self.samples: list[Sample] = []
        self.wait(lambda: "viser" in self.log.read_text())
        self._watcher = Client(self.port)
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def wait(self, condition: Callable[[], Any]) -> None:
        """Waits until something has happened."""
        end = time.monotonic() + self._seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"It did not happen in time: {self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    @property
    def step(self) -> int:
        """The step that the status line tells, 0 before the first."""
        found = re.search(r"step (\d+) of", self._watcher.status)
        return int(found[1]) if found else 0

    @property
    def editing(self) -> bool:
        """Whether the run is in its edit phase."""
        return self._watcher.status.startswith("**edit")

    def _sample(self) -> None:
        process = psutil.Process(self.process.pid)
        over = False
        while not over:
            over = self._over.wait(0.1)  # the end is sampled, too
            step = self.step
            if step > (self.samples[-1].step if self.samples else 0):
                memory = process.memory_info().rss / 2**20
                self.samples.append(Sample(step, memory, process.num_threads(), process.num_fds()))

    def _applied(self) -> int:
        # The file comes with a run's first checkpoint.
        return len(json.loads(self._history.read_text())) if self._history.exists() else 1

    def visit(self, number: int) -> None:
        """A viewer comes, looks, applies an instruction or takes it back, and leaves."""
        client = Client(self.port)
        # Each element is announced, the last ones with the panel's end.
        self.wait(lambda: any(e.get("label") == "Reset" for e in client._elements.copy().values()))
        client.look_from((25.0, 0.0, 8.0))
        client.set("Max res", 64)  # a CPU draws larger pictures for seconds
        self.wait(lambda: client.pictures > 0)
        seen = client.pictures
        client.look_from((0.0, 25.0, 8.0))
        self.wait(lambda: client.pictures > seen)
        applied = self._applied()
        if number % 2 == 0:
            instruction = f"make the ball {'red' if number % 4 else 'green'}"
            client.set("Instruction", instruction)
            self.wait(lambda: self._watcher.value("Instruction") == instruction)
            client.set("Apply instead" if number % 4 else "Apply on top", True)
            self.wait(lambda: self._applied() == applied + 1)
        else:
            client.set("Undo", True)
            self.wait(lambda: self._applied() == applied - 1)
            self.wait(lambda: self._watcher._element("Resume Training")["visible"])
            client.set("Resume Training", True)
            # viser drops the clicks of a client that is gone when they are handled.
            self.wait(lambda: not self._watcher._element("Resume Training")["visible"])
        client.leave(goodbye=number % 4 != 3)

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        self._over.set()
        self._sampler.join()
        self._watcher.leave()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(self._seconds)


def soak(folder: Path, steps: int, clients: int) -> list[Sample]:
    """The run, with its visits spread over the steps.

    Raises:
        RuntimeError: If the run ends before its time, or anything that was asked for does not happen.
    """
    run = Run(folder, steps)
    try:
        begin = RECONSTRUCT + LOCALIZE
        for number in range(clients):
            run.wait(lambda: run.step >= begin + (steps - begin) * number / clients and run.editing)
            run.visit(number)
            print(f"step {run.step}: {number + 1} of {clients} clients came and left", flush=True)
        run.wait(lambda: run.step >= steps)
        if (code := run.stop()) != 130:
            raise RuntimeError(f"The run ended with {code}: {run.log.read_text()[-3000:]}")
    finally:
        run.process.kill()
        run.process.wait()
    return run.samples


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Memory, threads and open files over the steps."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(7, 5), layout="constrained")
    rows = (("memory", "resident MiB"), ("threads", "threads"), ("files", "open files"))
    for axis, (name, label) in zip(axes, rows):
        values = [getattr(sample, name) for sample in samples]
        axis.plot([sample.step for sample in samples], values, linewidth=0.8)
        axis.axvline(WARM_UP * samples[-1].step, color="grey", linestyle=":")
        axis.set_ylim(0, 1.2 * max(values))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("step (dotted: end of warm-up)")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Runs, draws and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--clients", type=int, default=50, help="how often a viewer comes and leaves")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    samples = soak(options.output, options.steps, options.clients)
    found = growth(samples)
    result = {"growth": asdict(found), "samples": [asdict(sample) for sample in samples]}
    (options.output / "soak.json").write_text(json.dumps(result, indent=1))
    draw(samples, options.output / "soak.png")
    for part, sample in asdict(found).items():
        print(
            f"{part} third after warm-up: {sample['memory']:.0f} MiB, {sample['threads']} threads, {sample['files']} files"
        )
    complaints = found.complaints()
    print("\n".join(complaints) or f"Level: memory {100 * found.memory:+.1f} %, threads and files no more than before.")
    raise SystemExit(1 if complaints else 0)


if __name__ == "__main__":
    main()
