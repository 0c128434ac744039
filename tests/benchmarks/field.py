"""Cost of a training step with the relevance head, compared with plain nerfacto; both have wys-tiny's size.

Both models have the same random scene, rays and target colors, and are measured alternately. Times are medians of CPU seconds (of
wall-clock seconds on a GPU). Both use this package's hash encoding; one more row is nerfacto with nerfstudio's own. Memory is that
of weights, gradients, Adam's moments and the tensors saved for the backward pass. The hash encoding alone is compared with
nerfstudio's, and with --compile also with the compiled version of each.

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
    """Rays per step."""
    repeats: int = 9
    """Measured rounds, after one for warmup."""
    compile: bool = False
    """Also measure the hash encodings compiled with torch.compile."""
    device: str = "cpu"
    """Device."""
    output: Path = Path("field.json")
    """JSON file to write; the tables are also printed as Markdown."""


def build(kind: str) -> NerfactoModel:
    """Build a model of wys-tiny's size.

    Args:
        kind: Value of a phase for this package's model in that phase, else `PLAIN` or `STOCK`.
    """
    torch.manual_seed(0)
    tiny: Any = wys_tiny.config.pipeline.model
    scene = {"scene_box": SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3])), "num_train_data": VIEWS, "metadata": {}}
    if kind in (PLAIN, STOCK):
        options = {option.name: getattr(tiny, option.name) for option in fields(NerfactoModelConfig)}
        # nerfacto loads LPIPS even if it is not trained with it.
        with patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity"):
            model: NerfactoModel = NerfactoModelConfig(**{**options, "_target": NerfactoModel}).setup(**scene)
        if kind == PLAIN:
            use_fast_encodings(model)
        return model
    wys: WysModel = tiny.setup(**scene)
    wys.phase = Phase(kind)
    return wys


def stepper(model: NerfactoModel, options: Options) -> Callable[[], int]:
    """Return a function that trains one step and returns the number of bytes saved for its backward pass."""
    generator = torch.Generator().manual_seed(0)
    model.to(options.device).train()
    groups = {id(p): p for group in model.get_param_groups().values() for p in group}
    optimizer = torch.optim.Adam(groups.values(), lr=1e-3)
    # As in the edit phase, the proposal networks are trained at every fifth step.
    model.proposal_sampler._step = 5000
    directions = torch.nn.functional.normalize(torch.randn(options.rays, 3, generator=generator), dim=-1)
    batch = {"image": torch.rand(options.rays, 3, generator=generator), "patch_size": 32}
    batch["relevance"] = torch.rand(options.rays, 1, generator=generator)
    cameras = torch.randint(0, VIEWS, (options.rays, 1), generator=generator)

    def step() -> int:
        saved_bytes: dict[int, int] = {}

        def count(saved: torch.Tensor) -> torch.Tensor:
            saved_bytes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        rays = RayBundle(0.1 * directions, directions, torch.ones(options.rays, 1), cameras).to(options.device)
        optimizer.zero_grad()
        model.proposal_sampler.step_cb(5000)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            outputs = model(rays)
            losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
        sum(losses.values()).backward()  # type: ignore
        optimizer.step()
        return sum(saved_bytes.values())

    return step


def measure_alternately(
    functions: dict[str, Callable[[], Any]], options: Options
) -> dict[str, tuple[float, float, float]]:
    """Return the minimum, median and maximum seconds of each function; they are called alternately, after a warmup."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(options.repeats + 1):
        for name, function in functions.items():
            started = clock()
            function()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if repeat > 0:
                times[name].append(clock() - started)
    return {name: (min(t), statistics.median(t), max(t)) for name, t in times.items()}


def steps(options: Options) -> list[dict[str, Any]]:
    """Return one row per model: seconds and mebibytes of a training step."""
    models = {kind: build(kind) for kind in (PLAIN, *(phase.value for phase in Phase), STOCK)}
    train_step = {kind: stepper(model, options) for kind, model in models.items()}
    # Without the steps that train the proposal networks, which save more: the same amount for every model.
    saved_bytes = {kind: max(step() for _ in range(3)) for kind, step in train_step.items()}
    weights = {
        kind: sum(p.numel() * 4 * p.element_size() for p in model.parameters()) for kind, model in models.items()
    }
    seconds = measure_alternately(train_step, options)
    return [
        {
            "step": kind if kind in (PLAIN, STOCK) else f"wys, {kind}",
            "seconds": seconds[kind],
            "mib": (weights[kind] + saved_bytes[kind]) / 2**20,
            "time_ratio": seconds[kind][1] / seconds[PLAIN][1],
            "memory_ratio": (weights[kind] + saved_bytes[kind]) / (weights[PLAIN] + saved_bytes[PLAIN]),
        }
        for kind in models
    ]


def encodings(options: Options) -> list[dict[str, Any]]:
    """Return one row per hash encoding of wys-tiny's field: forward and backward pass of one step's samples."""
    torch.manual_seed(0)
    stock = HashEncoding(num_levels=8, max_res=512, log2_hashmap_size=15, implementation="torch").to(options.device)
    ours = copy.deepcopy(stock)
    use_fast_encodings(ours)
    modules: dict[str, Any] = {"nerfstudio's": stock, "this package's": ours}
    if options.compile:
        modules |= {f"{name}, compiled": torch.compile(module) for name, module in list(modules.items())}
    positions = torch.rand(24 * options.rays, 3, device=options.device)
    passes = {
        name: lambda module=module: module(positions).square().sum().backward() for name, module in modules.items()
    }
    seconds = measure_alternately(passes, options)
    first = seconds["nerfstudio's"][1]
    return [{"encoding": name, "seconds": times, "times_as_fast": first / times[1]} for name, times in seconds.items()]


def table(measured: dict[str, Any]) -> str:
    """Return both tables as Markdown."""

    def cell(times: tuple[float, float, float]) -> str:
        return f"{times[1]:.3f} ({times[0]:.3f} to {times[2]:.3f})"

    lines = ["| training step | seconds | relative to nerfacto | MiB | relative to nerfacto |", "|---|---|---|---|---|"]
    for row in measured["steps"]:
        values = row["time_ratio"], row["mib"], row["memory_ratio"]
        lines.append("| {} | {} | {:.2f} | {:.1f} | {:.2f} |".format(row["step"], cell(row["seconds"]), *values))
    lines += ["", "| hash encoding, forward and backward | seconds | speedup |", "|---|---|---|"]
    for row in measured["encodings"]:
        lines.append(f"| {row['encoding']} | {cell(row['seconds'])} | {row['times_as_fast']:.1f} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measure, print the tables and write the JSON file."""
    measured = {"steps": steps(options), "encodings": encodings(options)}
    print(table(measured))
    about = {"date": date.today().isoformat(), "hardware": platform.machine(), "torch": torch.__version__}
    about["options"] = {name: str(value) for name, value in asdict(options).items()}
    options.output.write_text(json.dumps(about | measured, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
