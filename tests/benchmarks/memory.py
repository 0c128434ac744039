"""Peak memory of each phase of a run: training of the scene, perceptual loss, and the editor in memory.

Each phase has a few steps, trained as by `ns-train`, with InstructPix2Pix's networks at full size with random weights, and a random
AlexNet. Each method runs in a process of its own. On a GPU the peak is the maximum that torch has allocated in the phase. On a CPU it is the maximum resident memory so far, in
single precision, which is no estimate of a GPU's.

    wys demo-scene SCENE
    python tests/benchmarks/memory.py SCENE --output DIR --device cuda --methods wys wys-small
"""

import copy
import json
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from nerfstudio.configs.method_configs import all_methods
from scale import write_scene
from speed import FULL_SIZE, full_size_editor
from torchvision.models import alexnet
from views import resident_gib

from wys_nerfstudio.editing import Editor, load_editor
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training.schedule import Phase


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Scene; its views are repeated and enlarged."""
    output: Path
    """Folder for memory.json, the scene and the runs."""
    device: str = "cpu"
    """Device of editor and scene."""
    methods: tuple[str, ...] = ("wys", "wys-small")
    """Methods to measure."""
    editor: str = FULL_SIZE
    """Editor, or "full-size" for random weights in InstructPix2Pix's sizes."""
    views: int = 100
    """Number of views."""
    side: int = 512
    """Longer side of the views in pixels."""
    steps: int = 6
    """Steps of each phase; in the edit phase there is one edit every two steps."""


def peak_gib(device: str) -> float:
    """Return the peak memory in GiB since the last reset; on a CPU since the start of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resident_gib("VmHWM")


def measure(method: str, scene: Path, options: Options) -> dict[str, float]:
    """Return the peak memory of each phase of a run in GiB. The run loads and releases the editor itself."""
    full = options.editor == FULL_SIZE

    def load(*_: object) -> Editor:
        return full_size_editor(options.device) if full else load_editor(options.editor, options.device)

    with mock.patch("wys_nerfstudio.pipeline.load_editor", load):
        return train(method, scene, options)


def train(method: str, scene: Path, options: Options) -> dict[str, float]:
    """Run a method; arguments and result as for `measure`."""
    config: WysTrainerConfig = copy.deepcopy(all_methods[method])  # type: ignore
    config.vis, config.machine.device_type = "tensorboard", torch.device(options.device).type  # type: ignore
    config.output_dir, config.pipeline.datamanager.data = options.output / "runs", scene
    config.pipeline.instruction = "turn the bear into a panda"
    config.pipeline.model.lpips_weights = options.output / "alexnet.pth"
    config.pipeline.reconstruct_steps = config.pipeline.localize_steps = config.pipeline.edit_steps = options.steps
    config.pipeline.edit_every = 2
    config.viewer.quit_on_train_completion = True
    config.set_timestamp()
    torch.manual_seed(0)
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    peaks: dict[str, float] = {}
    entered: list[Phase] = []
    enter_phase = trainer.pipeline.session.enter_phase

    def end_phase() -> None:
        if entered:
            peaks[entered[-1].value] = peak_gib(options.device)
        if options.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()

    def measured_enter_phase(phase: Phase) -> None:
        end_phase()
        entered.append(phase)
        enter_phase(phase)

    trainer.pipeline.session.enter_phase = measured_enter_phase
    trainer.train()
    end_phase()
    return peaks


def main(options: Options) -> None:
    """Measure, print the table and write the JSON file."""
    options.output.mkdir(parents=True, exist_ok=True)
    scene = options.output / "scene"
    write_scene(options.scene, scene, options.views, options.side)
    torch.save(alexnet(weights=None).state_dict(), options.output / "alexnet.pth")
    # A process keeps memory of the method before, and its peak.
    context = multiprocessing.get_context("spawn")
    result = {}
    for method in options.methods:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            result[method] = pool.submit(measure, method, scene, options).result()
    cuda = options.device.startswith("cuda")
    about: dict[str, Any] = {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in asdict(options).items()},
    }
    (options.output / "memory.json").write_text(json.dumps(about | {"peak_gib": result}, indent=1), "utf8")
    phases = [phase.value for phase in Phase]
    print(f"| peak memory, GiB | {' | '.join(phases)} |")
    print(f"|{'---|' * (len(phases) + 1)}")
    for method, peaks in result.items():
        print(f"| `{method}` | {' | '.join(f'{peaks[phase]:.1f}' for phase in phases)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
