"""What the relevance head adds to a training step: this package's model beside plain nerfacto, both of wys-tiny's size.

Both have the same random scene, rays and target colours and take turns; medians of CPU seconds (on a GPU of the clock's) are
compared. Both have this package's hash encoding; one more row has nerfacto as nerfstudio brings it. Memory is weights, their
gradients and Adam's moments, and what a step keeps for its backward pass. The hash encoding alone is measured beside
nerfstudio's and, with --compile, beside what torch.compile makes of each.

    python tests/benchmarks/field.py
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.encodings import use_fast_encodings

VIEWS = 44
PLAIN, STOCK = "nerfacto", "nerfacto, nerfstudio's hash encoding"


@dataclass
class Options:
    """Options of the benchmark."""

    rays: int = 1024
    """Rays of a step."""
    repeats: int = 9
    """Turns."""
    compile: bool = False
    """Also compile the hash encodings."""
    device: str = "cpu"
    """Where."""
    output: Path = Path("field.json")
    """JSON to write; Markdown goes to the terminal."""


def build(kind: str) -> NerfactoModel:
    """A model of wys-tiny's size, trained for a phase, or nerfacto."""
    torch.manual_seed(0)
    tiny: Any = wys_tiny.config.pipeline.model
    scene = {"scene_box": SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3])), "num_train_data": VIEWS, "metadata": {}}
    if kind in (PLAIN, STOCK):
        known = {option.name: getattr(tiny, option.name) for option in fields(NerfactoModelConfig)}
        # nerfacto loads LPIPS even to train without it.
        with patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity"):
            model: NerfactoModel = NerfactoModelConfig(**{**known, "_target": NerfactoModel}).setup(**scene)
        if kind == PLAIN:
            use_fast_encodings(model)
        return model
    wys: WysModel = tiny.setup(**scene)
    wys.phase = Phase(kind)
    return wys


def stepper(model: NerfactoModel, options: Options) -> Callable[[], int]:
    """A function that trains one step and returns the bytes that it kept for its backward pass."""
    generator = torch.Generator().manual_seed(0)
    model.to(options.device).train()
    groups = {id(p): p for group in model.get_param_groups().values() for p in group}
    optimizer = torch.optim.Adam(groups.values(), lr=1e-3)
    # As late in a run as edits are: the proposal networks learn at every fifth step.
    model.proposal_sampler._step = 5000
    directions = torch.nn.functional.normalize(torch.randn(options.rays, 3, generator=generator), dim=-1)
    batch = {"image": torch.rand(options.rays, 3, generator=generator), "patch_size": 32}
    batch["relevance"] = torch.rand(options.rays, 1, generator=generator)
    cameras = torch.randint(0, VIEWS, (options.rays, 1), generator=generator)

    def step() -> int:
        kept: dict[int, int] = {}

        def keep(saved: torch.Tensor) -> torch.Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        rays = RayBundle(0.1 * directions, directions, torch.ones(options.rays, 1), cameras).to(options.device)
        optimizer.zero_grad()
        model.proposal_sampler.step_cb(5000)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            outputs = model(rays)
            losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
        sum(losses.values()).backward()  # type: ignore
        optimizer.step()
        return sum(kept.values())

    return step


def in_turns(ways: dict[str, Callable[[], Any]], options: Options) -> dict[str, tuple[float, float, float]]:
    """Seconds of each way, the least, median and most of all turns; one more turn before warms up."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.repeats + 1):
        for name, way in ways.items():
            began = clock()
            way()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append(clock() - began)
    return {name: (min(t), statistics.median(t), max(t)) for name, t in times.items()}


def steps(options: Options) -> list[dict[str, Any]]:
    """A row per model: seconds and mebibytes of a step."""
    models = {kind: build(kind) for kind in (PLAIN, *(phase.value for phase in Phase), STOCK)}
    ways = {kind: stepper(model, options) for kind, model in models.items()}
    # Not at a step at which the proposal networks learn, which keeps more, but the same more for all.
    kept = {kind: max(way() for _ in range(3)) for kind, way in ways.items()}
    weights = {
        kind: sum(p.numel() * 4 * p.element_size() for p in model.parameters()) for kind, model in models.items()
    }
    seconds = in_turns(ways, options)
    return [
        {
            "step": kind if kind in (PLAIN, STOCK) else f"wys, {kind}",
            "seconds": seconds[kind],
            "mib": (weights[kind] + kept[kind]) / 2**20,
            "time_ratio": seconds[kind][1] / seconds[PLAIN][1],
            "memory_ratio": (weights[kind] + kept[kind]) / (weights[PLAIN] + kept[PLAIN]),
        }
        for kind in models
    ]


def encodings(options: Options) -> list[dict[str, Any]]:
    """A row per hash encoding of wys-tiny's field: forward and backward of a step's samples."""
    torch.manual_seed(0)
    stock = HashEncoding(num_levels=8, max_res=512, log2_hashmap_size=15, implementation="torch").to(options.device)
    ours = copy.deepcopy(stock)
    use_fast_encodings(ours)
    ways: dict[str, Any] = {"nerfstudio's": stock, "this package's": ours}
    if options.compile:
        ways |= {f"{name}, compiled": torch.compile(encoding) for name, encoding in list(ways.items())}
    positions = torch.rand(24 * options.rays, 3, device=options.device)
    runs = {name: lambda way=way: way(positions).square().sum().backward() for name, way in ways.items()}
    seconds = in_turns(runs, options)
    first = seconds["nerfstudio's"][1]
    return [{"encoding": name, "seconds": times, "times_as_fast": first / times[1]} for name, times in seconds.items()]


def table(measured: dict[str, Any]) -> str:
    """Both tables as Markdown."""

    def cell(times: tuple[float, float, float]) -> str:
        return f"{times[1]:.3f} ({times[0]:.3f} to {times[2]:.3f})"

    lines = ["| a training step | seconds | of nerfacto's | MiB | of nerfacto's |", "|---|---|---|---|---|"]
    for row in measured["steps"]:
        shares = row["time_ratio"], row["mib"], row["memory_ratio"]
        lines.append("| {} | {} | {:.2f} | {:.1f} | {:.2f} |".format(row["step"], cell(row["seconds"]), *shares))
    lines += ["", "| hash encoding, there and back | seconds | times as fast |", "|---|---|---|"]
    for row in measured["encodings"]:
        lines.append(f"| {row['encoding']} | {cell(row['seconds'])} | {row['times_as_fast']:.1f} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measures, prints the tables and writes the JSON."""
    measured = {"steps": steps(options), "encodings": encodings(options)}
    print(table(measured))
    about = {"date": date.today().isoformat(), "hardware": platform.machine(), "torch": torch.__version__}
    about["options"] = {name: str(value) for name, value in asdict(options).items()}
    options.output.write_text(json.dumps(about | measured, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
