"""Retraining: a new scene is trained on edited views, and edited views that it has not seen are compared with its renders.

Edited views that contradict each other cannot be predicted from each other, so the PSNR measures their consistency. The scene is
nerfacto as in a run's reconstruct phase, with the run's model, rays per batch and learning rates, in float32 and without pose
corrections, which the exported poses contain. nerfstudio-data holds out a tenth of the views, evenly spaced.
"""

import random
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig

from wys_nerfstudio.cli.export import edited_state, export_run
from wys_nerfstudio.evaluation.metrics import psnr
from wys_nerfstudio.trainer import WysTrainerConfig
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.progress import track

SEED = 0
MIN_VIEWS = 10
"""nerfstudio holds out none of fewer views."""


def require_retrainable(run: Path) -> None:
    """Refuse a run whose edited views cannot be retrained.

    Args:
        run: Folder of the run.

    Raises:
        WysError: If it has no edited views or too few views.
    """
    count = len(edited_state(run).views["names"])
    if count < MIN_VIEWS:
        raise WysError(
            f'The run "{run}" has {count} training views: --retrain holds out a tenth of them and needs at least {MIN_VIEWS}; '
            "leave it out."
        )


def retrained_psnr(run: Path, options: WysTrainerConfig, steps: int) -> float:
    """Train a new scene on the edited views of a run and return its mean PSNR on held-out ones, in dB.

    Args:
        run: Folder of the run.
        options: Options of the run.
        steps: Number of training steps.

    Raises:
        WysError: As for `export_run`.
    """
    with tempfile.TemporaryDirectory() as folder:
        export_run(run, Path(folder) / "data", renders=False, points=1)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(SEED)
        pipeline = train_scene(Path(folder) / "data", options, steps)
        return held_out_psnr(pipeline)


def train_scene(data: Path, options: WysTrainerConfig, steps: int) -> Any:
    """Train a new scene on a data set and return its pipeline.

    Args:
        data: The data set.
        options: Options of model, rays and learning rates.
        steps: Number of training steps.
    """
    model, manager = deepcopy(options.pipeline.model), deepcopy(options.pipeline.datamanager)
    model.camera_optimizer = CameraOptimizerConfig(mode="off")
    manager.data, manager.dataparser = data, NerfstudioDataParserConfig(data=data)
    manager.camera_res_scale_factor = 1.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline: Any = VanillaPipelineConfig(datamanager=manager, model=model).setup(device=device, test_mode="test")
    pipeline.model.phase = Phase.RECONSTRUCT
    pipeline.train()
    optimizers = Optimizers(deepcopy(options.optimizers), pipeline.get_param_groups())
    callbacks = pipeline.get_training_callbacks(TrainingCallbackAttributes(optimizers, None, pipeline, None))
    for step in track(range(steps), description="Retraining"):
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        optimizers.zero_grad_all()
        losses = pipeline.get_train_loss_dict(step)[1]
        torch.stack([*losses.values()]).sum().backward()
        optimizers.optimizer_step_all()
        optimizers.scheduler_step_all(step)
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
    return pipeline


@torch.no_grad()
def held_out_psnr(pipeline: Any) -> float:
    """Return the mean PSNR of renders of the held-out views within their frame masks, in dB.

    Args:
        pipeline: Result of `train_scene`.
    """
    pipeline.eval()
    data, values = pipeline.datamanager.eval_dataset, []
    for view in range(len(data)):
        render = pipeline.model.get_outputs_for_camera(data.cameras[view : view + 1].to(pipeline.device))["rgb"]
        held_out = data.get_data(view)
        mask = held_out["mask"][..., 0] > 0 if "mask" in held_out else None
        values.append(psnr(render.cpu(), held_out["image"], mask))
    return sum(values) / len(values)
