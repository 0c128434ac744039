"""Soak test: growth of memory, threads and open files in a long run whose viewer is used all the time.

    python tests/benchmarks/soak.py --output /tmp/soak

`ns-train wys-tiny` runs in a process of its own on a small scene. Clients connect one after the other, over a websocket with viser's
protocol, like the viewer's page in a browser. Each waits for renders, applies an instruction or undoes one and resumes training, and
disconnects; every fourth client drops the connection without closing it. Memory, threads and open files of the run's process are
sampled at every step. Writes `soak.json` and `soak.png`. The exit code is 1 if anything grew after warmup.
"""

import argparse
import html
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
WARMUP = 0.25
"""Share of the steps before which growth is ignored."""
MEMORY_GROWTH = 0.05
"""Growth of resident memory, as a share, that is reported as growth."""


@dataclass(frozen=True)
class Sample:
    """Resources of the run's process at a step."""

    step: int
    """Number of trained steps."""
    memory: float
    """Resident memory in MiB."""
    threads: int
    """Number of threads."""
    files: int
    """Number of open file descriptors, including sockets."""


@dataclass(frozen=True)
class Growth:
    """Medians of the first and the last third of the samples after warmup."""

    first: Sample
    last: Sample

    @property
    def memory(self) -> float:
        """Growth of resident memory, as a share."""
        return self.last.memory / self.first.memory - 1

    def messages(self) -> list[str]:
        """Return one message for each resource that grew."""
        messages = []
        if self.memory >= MEMORY_GROWTH:
            messages.append(f"resident memory grew by {100 * self.memory:.1f} % after warmup")
        for name in ("threads", "files"):
            before, after = getattr(self.first, name), getattr(self.last, name)
            if after > before:
                messages.append(f"{name} grew from {before} to {after} after warmup")
        return messages


def growth(samples: Sequence[Sample]) -> Growth:
    """Compare the first and the last third of the samples after warmup; in shorter parts, differences between phases would show."""
    warm = [sample for sample in samples if sample.step >= WARMUP * samples[-1].step]
    third = len(warm) // 3

    def median(part: Sequence[Sample]) -> Sample:
        columns = zip(*(asdict(sample).values() for sample in part))
        step, memory, threads, files = map(statistics.median_low, columns)
        return Sample(step, memory, threads, files)

    return Growth(median(warm[:third]), median(warm[-third:]))


class Client:
    """Connection to the viewer; stores the state of the panel.

    Args:
        port: Port of the viewer.
    """

    def __init__(self, port: int) -> None:
        self._connection = connect(f"ws://127.0.0.1:{port}", max_size=None).__enter__()  # closed by `disconnect`
        self._elements: dict[str, dict[str, Any]] = {}
        self.renders = 0
        """Number of renders received."""
        self.status = ""
        """The panel's status line."""
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        try:
            for packed in self._connection:
                for message in msgpack.unpackb(packed):  # type: ignore
                    self._handle(message)
        except ConnectionClosed:
            pass

    def _handle(self, message: dict[str, Any]) -> None:
        if message["type"].startswith("GuiAdd"):
            self._elements[message["id"]] = message
        elif message["type"] == "GuiUpdateMessage" and message["id"] in self._elements:
            self._elements[message["id"]].update(message["updates"])
        self.renders += message["type"] == "BackgroundImageMessage"
        text = html.unescape(message.get("updates", message).get("markdown") or "")
        if text.startswith("**"):
            self.status = text

    def _elements_with(self, label: str) -> list[dict[str, Any]]:
        return [e for e in self._elements.copy().values() if (e.get("label") or "").strip() == label]

    def has(self, label: str) -> bool:
        """Return whether the panel has an element."""
        return bool(self._elements_with(label))

    def element(self, label: str) -> dict[str, Any]:
        """Return the state of an element of the panel."""
        (found,) = self._elements_with(label)
        return found

    def send(self, kind: str, **fields: Any) -> None:
        """Send one of viser's messages."""
        self._connection.send(msgpack.packb({"type": kind, **fields}))

    def set(self, label: str, value: Any) -> None:
        """Set the value of an element of the panel; True clicks a button."""
        self.send("GuiUpdateMessage", id=self.element(label)["id"], updates={"value": value})

    def look_from(self, position: Sequence[float]) -> None:
        """Move the camera. nerfstudio renders for a client once it has done so."""
        self.send(
            "ViewerCameraMessage",
            wxyz=(0.5, 0.5, -0.5, -0.5),
            position=position,
            fov=0.8,
            aspect=1.25,
            look_at=(0.0, 0.0, 0.0),
            up_direction=(0.0, 0.0, 1.0),
        )

    def disconnect(self, close: bool = True) -> None:
        """Close the connection, or drop it without closing."""
        if close:
            self._connection.close()
        else:
            self._connection.socket.shutdown(socket.SHUT_RDWR)


class Run:
    """ns-train in a process of its own. A client without a camera reads the status line, and the process is sampled at every
    step.

    Args:
        folder: Folder for scene, editor, log and run.
        steps: Steps of the run; applied instructions add more.
        timeout: Maximum number of seconds to wait for anything.
    """

    def __init__(self, folder: Path, steps: int, timeout: float = 300) -> None:
        self._timeout = timeout
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
        self._observer = Client(self.port)
        self._stopping = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition is true.

        Raises:
            RuntimeError: If the process ends, or after the timeout.
        """
        end = time.monotonic() + self._timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The run ended or timed out. End of its log: {self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    @property
    def step(self) -> int:
        """Step in the status line; 0 before the first."""
        found = re.search(r"step (\d+) of", self._observer.status)
        return int(found[1]) if found else 0

    @property
    def editing(self) -> bool:
        """Whether the run is in its edit phase."""
        return self._observer.status.startswith("**edit")

    def _sample(self) -> None:
        process = psutil.Process(self.process.pid)
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(0.1)  # read first, so that the last step is sampled too
            step = self.step
            if step > (self.samples[-1].step if self.samples else 0):
                memory = process.memory_info().rss / 2**20
                self.samples.append(Sample(step, memory, process.num_threads(), process.num_fds()))

    def _history_length(self) -> int:
        # The file is written with the first checkpoint of the run.
        return len(json.loads(self._history.read_text())) if self._history.exists() else 1

    def visit(self, number: int) -> None:
        """Connect, wait for renders, apply or undo an instruction, and disconnect.

        Args:
            number: Number of the client; odd ones undo what the one before has applied.
        """
        client = Client(self.port)
        self.wait(lambda: client.has("Reset"))  # the last element of the panel
        client.look_from((25.0, 0.0, 8.0))
        client.set("Max res", 64)  # larger renders take seconds on a CPU
        self.wait(lambda: client.renders > 0)
        received = client.renders
        client.look_from((0.0, 25.0, 8.0))
        self.wait(lambda: client.renders > received)
        length = self._history_length()
        if number % 2 == 0:
            instruction = f"make the ball {'red' if number % 4 else 'green'}"
            client.set("Instruction", instruction)
            self.wait(lambda: self._observer.element("Instruction")["value"] == instruction)
            client.set("Apply instead" if number % 4 else "Apply on top", True)
            self.wait(lambda: self._history_length() == length + 1)
        else:
            client.set("Undo", True)
            self.wait(lambda: self._history_length() == length - 1)
            self.wait(lambda: self._observer.element("Resume Training")["visible"])
            client.set("Resume Training", True)
            # viser discards the clicks of a client that has disconnected before they are handled.
            self.wait(lambda: not self._observer.element("Resume Training")["visible"])
        client.disconnect(close=number % 4 != 3)

    def stop(self) -> int:
        """Interrupt the run as with Ctrl-C, and return its exit code."""
        self._stopping.set()
        self._sampler.join()
        self._observer.disconnect()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(self._timeout)


def soak(folder: Path, steps: int, clients: int) -> list[Sample]:
    """Run ns-train with visits of clients spread evenly over the edit phase.

    Args:
        folder: Folder for scene, editor, log and run.
        steps: Steps of the run.
        clients: Number of clients.

    Returns:
        Samples of the process, in the order of steps.

    Raises:
        RuntimeError: If the run ends too early, or a command of a client has no effect.
    """
    run = Run(folder, steps)
    try:
        edit_start = RECONSTRUCT + LOCALIZE
        for number in range(clients):
            run.wait(lambda: run.step >= edit_start + (steps - edit_start) * number / clients and run.editing)
            run.visit(number)
            print(f"Step {run.step}: {number + 1} of {clients} clients.", flush=True)
        run.wait(lambda: run.step >= steps)
        if (code := run.stop()) != 130:
            raise RuntimeError(f"The run ended with exit code {code}. End of its log: {run.log.read_text()[-3000:]}")
    finally:
        run.process.kill()
        run.process.wait()
    return run.samples


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Plot memory, threads and open files over the steps.

    Args:
        samples: Result of `soak`.
        path: PNG file to write.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(7, 5), layout="constrained")
    rows = (("memory", "resident MiB"), ("threads", "threads"), ("files", "open files"))
    for axis, (name, label) in zip(axes, rows):
        values = [getattr(sample, name) for sample in samples]
        axis.plot([sample.step for sample in samples], values, linewidth=0.8)
        axis.axvline(WARMUP * samples[-1].step, color="gray", linestyle=":")
        axis.set_ylim(0, 1.2 * max(values))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("step (dotted: end of warmup)")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Run, write results and plot, and report growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="steps of the run")
    parser.add_argument("--clients", type=int, default=50, help="number of clients that connect and disconnect")
    parser.add_argument("--output", type=Path, required=True, help="new folder for run and results")
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    samples = soak(options.output, options.steps, options.clients)
    grown = growth(samples)
    result = {"growth": asdict(grown), "samples": [asdict(sample) for sample in samples]}
    (options.output / "soak.json").write_text(json.dumps(result, indent=1))
    plot(samples, options.output / "soak.png")
    for part, sample in asdict(grown).items():
        print(
            f"{part} third after warmup: {sample['memory']:.0f} MiB, {sample['threads']} threads, {sample['files']} files"
        )
    messages = grown.messages()
    print("\n".join(messages) or f"No growth: memory {100 * grown.memory:+.1f} %, threads and files did not increase.")
    raise SystemExit(1 if messages else 0)


if __name__ == "__main__":
    main()
