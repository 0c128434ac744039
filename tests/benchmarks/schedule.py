"""Quality of the edit phase over its CPU seconds, for rates of edits and rays per step, against a toy scene's ground truth.

    wys demo-scene SCENE && python tests/benchmarks/schedule.py SCENE --instruction "turn the bear into a panda"

Per seed, the scene is reconstructed and localized once; every variant of the edit phase starts from that state. Rendering for PSNR is
not counted. Rows are added to `schedule.json`, so that several scenes can follow one another. Two tables are printed:

- the variants at equal cost: the measurement of each that is nearest to `--at-seconds`;
- an end by convergence: the steps that are saved, and the PSNR inside that is lost, if the edit phase ends at the first measurement
  with a change below a threshold. The change is the mean absolute difference, inside the masks, of consecutive edits of a view, or of
  the renders that these start from.
"""

import copy
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Optional

import numpy as np
import torch
import tyro
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from torch import Tensor

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.demo.score import render_views
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.metrics import psnr
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.utils.visualization import evenly_spaced

Row = dict[str, Any]
"""A measurement."""

VARIANTS = [(5, 1, 1024), (10, 1, 1024), (20, 1, 1024), (2, 1, 1024), (20, 4, 1024), (5, 1, 512), (5, 1, 2048)]
"""Steps from one edit to the next, views edited together, rays per step; the first is that of `wys-tiny`."""

THRESHOLDS = {"render change": (0.03, 0.05, 0.1), "edit change": (0.05, 0.055, 0.09)}
"""Ends by convergence."""


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Toy scene with ground truth."""
    instruction: str = "turn the bear into a panda"
    """What to change; the scene has its ground truth."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    reconstruct_steps: int = 800
    """Steps of reconstruction."""
    localize_steps: int = 400
    """Steps of training the relevance head."""
    edit_steps: int = 800
    """Steps of the edit phase."""
    measure_every: int = 100
    """Steps between two measurements."""
    views: int = 12
    """Training views that are measured, besides all held-out views."""
    at_seconds: float = 60.0
    """CPU seconds at which the variants are compared."""
    output: Path = Path("schedule.json")
    """JSON file that rows are added to."""


def build_trainer(options: Options, seed: int) -> WysTrainer:
    """Return a trainer before the first step."""
    config: WysTrainerConfig = copy.deepcopy(wys_tiny.config)  # type: ignore
    config.vis, config.machine.seed, config.pipeline.seed = "tensorboard", seed, seed
    config.output_dir = options.output.parent / "schedule-runs"
    config.pipeline.datamanager.data, config.pipeline.instruction = options.scene, options.instruction
    config.pipeline.reconstruct_steps, config.pipeline.localize_steps = (
        options.reconstruct_steps,
        options.localize_steps,
    )
    config.pipeline.edit_steps = options.edit_steps
    config.set_timestamp()
    torch.manual_seed(seed)
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def train_step(trainer: WysTrainer, step: int) -> None:
    """Train one step, with the edits that are due."""
    trainer.pipeline.session.prepare_relevance(trainer.pipeline.session.schedule.phase(step))
    trainer.pipeline.train()
    for location in (TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN_ITERATION):
        if location == TrainingCallbackLocation.AFTER_TRAIN_ITERATION:
            trainer.train_iteration(step)
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, location=location)


class Measure:
    """PSNR of renders, inside and outside the true mask.

    Args:
        trainer: The run.
        options: Options of the benchmark.
    """

    def __init__(self, trainer: WysTrainer, options: Options) -> None:
        data = trainer.pipeline.datamanager
        truth = GroundTruth.find(options.scene, options.instruction)
        assert truth is not None
        training = evenly_spaced(options.views, len(data.train_dataset))
        views = [(data.train_dataset, i) for i in training]
        views += [(data.eval_dataset, i) for i in range(len(data.eval_dataset))]
        names = [dataset.image_filenames[i].name for dataset, i in views]
        self._cameras = [dataset.cameras[i : i + 1] for dataset, i in views]
        self._targets = [(truth.edited(name), truth.mask(name)) for name in names]
        self._pipeline = trainer.pipeline

    def __call__(self) -> tuple[float, float]:
        """Mean PSNR over the views in dB: inside, outside."""
        rows = []
        for camera, (target, mask) in zip(self._cameras, self._targets):
            if mask.any():
                render = render_views(self._pipeline, camera)[0]["rgb"]
                rows.append((psnr(render, target, mask), psnr(render, target, ~mask)))
        inside, outside = zip(*rows)
        return mean(inside), mean(outside)


def measure_seed(options: Options, seed: int) -> list[Row]:
    """Return the rows of all variants for one seed."""
    trainer = build_trainer(options, seed)
    pipeline, optimizers = trainer.pipeline, trainer.optimizers
    session, data = pipeline.session, pipeline.datamanager
    first = session.schedule.edit_start
    for step in range(first):
        train_step(trainer, step)
    measure, snapshot = Measure(trainer, options), copy.deepcopy(session.snapshot(first - 1))
    adam = copy.deepcopy({name: optimizer.state_dict() for name, optimizer in optimizers.optimizers.items()})
    rates = copy.deepcopy({name: scheduler.state_dict() for name, scheduler in optimizers.schedulers.items()})
    rows = []
    for every, count, rays in VARIANTS:
        changes = Changes(trainer)
        session.restore(copy.deepcopy(snapshot), first - 1)
        optimizers.load_optimizers(copy.deepcopy(adam))
        optimizers.load_schedulers(copy.deepcopy(rates))
        pipeline.settings.update(edit_every=every, edit_count=count)
        data.config.edit_num_rays_per_batch = rays
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        seconds = 0.0
        for done in range(1, options.edit_steps + 1):
            began = time.process_time()
            train_step(trainer, first + done - 1)
            seconds += time.process_time() - began
            if done % options.measure_every == 0:
                inside, outside = measure()
                rows.append(
                    {
                        "instruction": options.instruction,
                        "seed": seed,
                        "edit_every": every,
                        "edit_count": count,
                        "rays": rays,
                        "steps": done,
                        "edits": session.edit_loop.edits,
                        "CPU seconds": round(seconds, 2),
                        "inside": round(inside, 3),
                        "outside": round(outside, 3),
                        **changes.take(),
                    }
                )
                print(rows[-1], flush=True)
    return rows


class Changes:
    """Mean absolute differences inside the masks of consecutive edits of a view, and of the renders that these start from.

    Args:
        trainer: The run.
    """

    def __init__(self, trainer: WysTrainer) -> None:
        loop, data = trainer.pipeline.session.edit_loop, trainer.pipeline.datamanager
        prepare_edit, set_view = type(loop).prepare_edit, type(data).set_view
        renders: dict[int, Tensor] = {}
        edits: dict[int, Tensor] = {}
        masks: dict[int, Tensor] = {}
        self._found: dict[str, list[float]] = {"edit change": [], "render change": []}

        def note(kind: str, latest: dict[int, Tensor], view: int, image: Tensor, mask: Tensor) -> None:
            if view in latest and mask.any():
                self._found[kind].append(float((image - latest[view]).abs()[mask].mean()))
            latest[view] = image

        def prepare(view: int, *arguments: Any) -> Any:
            result = prepare_edit(loop, view, *arguments)
            masks[view] = result.mask
            note("render change", renders, view, result.render, result.mask)
            return result

        def set_image(view: int, image: Tensor) -> None:
            note("edit change", edits, view, image, masks[view])
            set_view(data, view, image)

        loop.prepare_edit, data.set_view = prepare, set_image  # type: ignore

    def take(self) -> dict[str, Optional[float]]:
        """Means since the last call; None without a view that was edited twice."""
        means = {kind: round(mean(values), 5) if values else None for kind, values in self._found.items()}
        for values in self._found.values():
            values.clear()
        return means


def spread(values: Sequence[float]) -> str:
    """Mean (minimum to maximum)."""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def grouped(rows: Sequence[Row], *columns: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values in some columns, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


VARIANT = ("instruction", "edit_every", "edit_count", "rays")


def equal_cost_table(rows: Sequence[Row], seconds: float) -> list[list[str]]:
    """Header and one row per variant: its measurement nearest to a number of CPU seconds, over the seeds."""
    table = [
        ["edit", "steps between edits", "views together", "rays", "steps", "edits", "CPU seconds", "inside", "outside"]
    ]
    for variant, measured in grouped(rows, *VARIANT).items():
        by_steps = grouped(measured, "steps")
        cost = {steps: mean(row["CPU seconds"] for row in group) for steps, group in by_steps.items()}
        nearest = min(cost, key=lambda steps: abs(cost[steps] - seconds))
        group = by_steps[nearest]
        edits, found = group[0]["edits"], [spread([row[side] for row in group]) for side in ("inside", "outside")]
        table.append([*map(str, (*variant, *nearest, edits)), f"{cost[nearest]:.0f}", *found])
    return table


def convergence_table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and one row per threshold: steps saved and PSNR inside lost by ending there, over all runs."""
    table = [["end at the first", "below", "steps saved", "inside lost, mean", "inside lost, most"]]
    for kind, thresholds in THRESHOLDS.items():
        for threshold in thresholds:
            saved, lost = [], []
            for run in grouped(rows, *VARIANT, "seed").values():
                below = [row for row in run if row[kind] is not None and row[kind] < threshold]
                end = below[0] if below else run[-1]
                saved.append(1 - end["steps"] / run[-1]["steps"])
                lost.append(run[-1]["inside"] - end["inside"])
            table.append([kind, f"{threshold}", f"{mean(saved):.0%}", f"{mean(lost):.2f}", f"{max(lost):.2f}"])
    return table


def main(options: Options) -> None:
    """Measure all seeds, add their rows to the JSON file, and print the tables of all rows in it."""
    rows: list[Row] = json.loads(options.output.read_text("utf8")) if options.output.is_file() else []
    for seed in options.seeds:
        rows += measure_seed(options, seed)
        options.output.write_text(json.dumps(rows, indent=1), "utf8")
    for table in (equal_cost_table(rows, options.at_seconds), convergence_table(rows)):
        print(*(f"| {' | '.join(line)} |" for line in (table[0], ["---"] * len(table[0]), *table[1:])), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
