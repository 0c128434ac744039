"""Profile of the edit phase: the parts of one period (five steps and an edit), and the operations in them.

    wys demo-scene SCENE && ns-train wys-tiny --data SCENE --instruction "turn the bear into a panda" --vis tensorboard
    OMP_NUM_THREADS=1 python tests/benchmarks/edit_phase.py SCENE RUN/wys/captured.ckpt

Parts are CPU seconds of this process, averaged over the periods. Operations are self times from torch's profiler, over one more
period.
"""

import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import speed
import torch
import tyro
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from torch.profiler import ProfilerActivity, profile

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.trainer import WysTrainer


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Scene whose views are edited."""
    run: tyro.conf.Positional[Path]
    """Run or checkpoint on that scene."""
    instruction: str = "turn the bear into a panda"
    """What to change."""
    periods: int = 8
    """Number of measured periods, after one for warmup."""
    output: Path = Path("edit-phase.json")
    """JSON file to write; the tables are also printed as Markdown."""


class Stopwatch:
    """CPU seconds of named parts. The time of a nested part is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._nested: list[float] = []

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Measure every call of a method.

        Args:
            owner: Object whose method is replaced.
            method: Name of the method.
            part: Name of the part that the time is added to.
        """
        original: Callable[..., Any] = getattr(owner, method)

        def watched(*arguments: Any, **named: Any) -> Any:
            self._nested.append(0.0)
            started = time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                elapsed = time.process_time() - started
                self.seconds[part] += elapsed - self._nested.pop()
                if self._nested:
                    self._nested[-1] += elapsed

        setattr(owner, method, watched)


def watch_parts(trainer: WysTrainer, stopwatch: Stopwatch) -> None:
    """Measure the parts of a period."""
    pipeline, editor = trainer.pipeline, trainer.pipeline.editor()
    stopwatch.watch(trainer, "train_iteration", "backward pass of the steps")
    stopwatch.watch(pipeline, "get_train_loss_dict", "forward pass of the steps")
    stopwatch.watch(trainer.optimizers, "optimizer_scaler_step_some", "optimizers")
    stopwatch.watch(pipeline.session.edit_loop, "edit", "the rest of the edit: masks, files")
    stopwatch.watch(pipeline.session.edit_loop, "prepare_edit", "render of the view")
    stopwatch.watch(editor, "predict", "UNet")
    stopwatch.watch(editor, "encode", "VAE")
    stopwatch.watch(editor, "decode", "VAE")


def period(trainer: WysTrainer, first: int) -> None:
    """Run one edit and the steps until the next one.

    Args:
        trainer: Trainer in its edit phase.
        first: First step of the period.
    """
    for step in range(first, first + trainer.config.pipeline.edit_every):
        trainer.pipeline.train()
        with trainer.train_lock:
            for callback in trainer.callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        trainer.train_iteration(step)
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)


def measure(options: Options) -> dict[str, Any]:
    """Return parts and operations as plain data."""
    build = speed.Options(options.scene, instruction=options.instruction, batch=1, output=options.output)
    trainer = speed.build_trainer(build, options.run, wys_tiny.config.pipeline, localized=True)  # type: ignore
    first, every = trainer.pipeline.session.schedule.edit_start, trainer.config.pipeline.edit_every
    stopwatch = Stopwatch()
    watch_parts(trainer, stopwatch)
    for number in range(options.periods + 1):
        if number == 1:
            stopwatch.seconds.clear()
        period(trainer, first + number * every)
    parts = {part: seconds / options.periods for part, seconds in stopwatch.seconds.items()}
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        period(trainer, first + (options.periods + 1) * every)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "operations": {event.key: event.self_cpu_time_total / total for event in events[:15]},
    }


def main(options: Options) -> None:
    """Measure, print both tables and write the JSON file."""
    result = measure(options)
    total = sum(result["parts"].values())
    print("| part of a period | seconds | share |\n|---|---|---|")
    for part, seconds in result["parts"].items():
        print(f"| {part} | {seconds:.2f} | {seconds / total:.0%} |")
    print("\n| operation | share |\n|---|---|")
    for name, share in result["operations"].items():
        print(f"| `{name}` | {share:.0%} |")
    options.output.write_text(json.dumps(result, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
