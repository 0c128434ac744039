"""Time and peak memory of each stage of a run on many large photographs, from start-up to evaluation.

The views of a capture are repeated and enlarged. The editor is the scripted one of `photographs.py`, which edits at 512 pixels and takes
no time of its own, so that what is measured is everything beside the editor's networks. Memory is that of the whole process. ns-eval
is measured on few views: its time is proportional to their number, its memory is that of all views. Writes `full_size.json`.

    python tests/benchmarks/full_size.py CAPTURE --output DIR --views 300 --side 1920
"""

import copy
import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch
import tyro
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from nerfstudio.utils.eval_utils import eval_setup
from photographs import ScriptedEditor
from scale import write_scene
from speed import train_steps
from views import resident_gib

from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.pipeline import WysPipeline
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training.schedule import Phase

EVALUATED_VIEWS = 2
"""Number of training views that ns-eval is measured on."""
Result = TypeVar("Result")


@dataclass
class Options:
    """Options of the benchmark."""

    capture: tyro.conf.Positional[Path]
    """Capture in nerfstudio's format; its views are repeated and enlarged."""
    output: Path
    """Folder for full_size.json, the views and the run."""
    views: int = 300
    """Number of training views."""
    side: int = 1920
    """Their longer side in pixels."""
    method: str = "wys-tiny"
    """Method that is trained."""
    steps: int = 10
    """Training steps of the reconstruct phase."""
    edits: int = 5
    """Edits, each after the steps that the method has between two."""


@dataclass
class Row:
    """Measurements of one stage."""

    stage: str
    """Name of the stage."""
    seconds: float
    """CPU seconds, which hardly depend on other work on the machine."""
    peak_gib: float
    """Peak resident memory of the process during the stage."""


def build_config(options: Options, scene: Path) -> WysTrainerConfig:
    """Return the run's config; every step of it is trained by the stages."""
    config: WysTrainerConfig = copy.deepcopy(all_methods[options.method])  # type: ignore
    config.vis, config.machine.device_type, config.output_dir = "tensorboard", "cpu", options.output / "runs"  # type: ignore
    config.pipeline.datamanager.data, config.pipeline.instruction = scene, "make it blue"
    config.pipeline.reconstruct_steps, config.pipeline.localize_steps = options.steps, options.steps
    config.pipeline.edit_steps = options.edits * config.pipeline.edit_every
    config.set_timestamp()
    config.save_config()
    return config


class Stages:
    """Measures stages one after the other."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, name: str, work: Callable[[], Result]) -> Result:
        """Carry out and measure a stage."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        began = time.process_time()
        result = work()
        self.rows.append(Row(name, time.process_time() - began, resident_gib("VmHWM")))
        print(self.rows[-1], flush=True)
        return result


def measure_run(options: Options, scene: Path, stage: Stages) -> Path:
    """Carry out a run stage by stage, and return its config.yml."""
    torch.manual_seed(0)
    trainer: WysTrainer = build_config(options, scene).setup(local_rank=0, world_size=1)
    stage("start-up", trainer.setup)
    session, schedule = trainer.pipeline.session, trainer.pipeline.session.schedule
    stage(f"{options.steps} steps of reconstruction", lambda: train_steps(trainer, 0, options.steps))
    stage(f"{options.views} relevance maps", lambda: session.prepare_relevance(Phase.LOCALIZE))
    localize = schedule.reconstruct_steps
    stage(f"{options.steps} steps of localization", lambda: train_steps(trainer, localize, options.steps))
    stage("visual hull", session.edit_loop.build_visual_hull)
    stage("begin of the edit phase", lambda: session.enter_phase(Phase.EDIT))
    steps = schedule.edit_steps
    stage(f"{options.edits} edits and {steps} steps", lambda: train_steps(trainer, schedule.edit_start, steps))
    last = schedule.total_steps - 1
    stage("commit of the last edits", lambda: session.finish(last))
    stage("checkpoint", lambda: trainer.save_checkpoint(last))
    stage("contact sheet", lambda: session.edit_loop.write_contact_sheet(session.run.folder, lambda: False))
    return trainer.base_dir / "config.yml"


def measure_evaluation(config: Path, stage: Stages) -> None:
    """Evaluate a finished run as ns-eval does, on the held-out view and on some of the training views."""
    pipeline: WysPipeline = stage("ns-eval: start-up", lambda: eval_setup(config, test_mode="test")[1])  # type: ignore
    stage("ns-eval: 1 held-out view", lambda: VanillaPipeline.get_average_eval_image_metrics(pipeline))
    pipeline.eval()
    with mock.patch.object(WysDataManager, "num_views", EVALUATED_VIEWS):
        stage(f"ns-eval: {EVALUATED_VIEWS} training views", pipeline.evaluate_edit)


def table(rows: Sequence[Row]) -> str:
    """Return the measurements as Markdown."""
    lines = [f"| {row.stage} | {row.seconds:.1f} | {row.peak_gib:.2f} |" for row in rows]
    return "\n".join(["| stage | CPU seconds | peak, GiB |", "|---|---|---|", *lines])


def main(options: Options) -> None:
    """Measure, print the table and write the JSON file."""
    options.output.mkdir(parents=True, exist_ok=True)
    scene = options.output / "scene"
    write_scene(options.capture, scene, options.views, options.side, suffix=".jpg")
    editor, stage = ScriptedEditor(jitter=0.08), Stages()
    with mock.patch("wys_nerfstudio.pipeline.load_editor", lambda *_: editor):
        run_config = measure_run(options, scene, stage)
    measure_evaluation(run_config, stage)
    print(table(stage.rows))
    about = {"date": date.today().isoformat(), "hardware": platform.machine(), "torch": torch.__version__}
    settings = {name: str(value) for name, value in asdict(options).items()}
    result = {**about, "options": settings, "rows": [asdict(row) for row in stage.rows]}
    (options.output / "full_size.json").write_text(json.dumps(result, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
