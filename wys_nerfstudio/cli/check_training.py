"""Speed and memory of a method's training steps, and the estimated time of a run.

The steps are those of the method's model with its rays per batch, on random rays, colors and relevance: their time does not depend
on the scene. What a run does beside training and edits, such as loading views and writing files, is not counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from wys_nerfstudio.cli.check_editor import EditorSpeed
from wys_nerfstudio.cli.check_machine import NOT_DOWNLOADED
from wys_nerfstudio.cli.check_measure import mean_seconds, peak_memory, reset_peak_memory
from wys_nerfstudio.cli.check_table import Table
from wys_nerfstudio.evaluation.lpips import lpips_is_cached
from wys_nerfstudio.model import WysModel, WysModelConfig
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainerConfig
from wys_nerfstudio.training.memory import memory_remedies
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import convert_memory_errors

NUM_CAMERAS = 100
"""Number of camera embeddings of the measured model."""
STEPS = 5
"""Measured steps of each phase. The proposal networks are trained in every fifth step."""
LATE_STEP = 5000
"""Step at which the proposal sampler's warmup is over."""


@dataclass
class TrainingSpeed:
    """Speed of a method's training."""

    step_seconds: dict[Phase, float]
    """Seconds of a training step in each phase."""
    ray_seconds: float
    """Seconds of rendering a ray, as before an edit."""


def measure_training(config: WysTrainerConfig, device: torch.device) -> tuple[Table, Optional[TrainingSpeed]]:
    """Train a few steps of each phase and render a chunk of rays.

    Args:
        config: Options of the method; without AlexNet's weights, the perceptual loss is switched off.
        device: Device of the scene.

    Returns:
        A table, and the speed; None if the memory does not suffice.
    """
    options, data = config.pipeline.model, config.pipeline.datamanager
    table: Table = {"method": str(config.method_name), "encodings": options.implementation}
    if options.lpips_loss_mult > 0 and not lpips_is_cached(options.lpips_weights):
        options.lpips_loss_mult = 0.0
        table["perceptual loss"] = f"not measured: {NOT_DOWNLOADED}"
    rays = {
        Phase.RECONSTRUCT: data.train_num_rays_per_batch,
        Phase.LOCALIZE: data.localize_rays,
        Phase.EDIT: data.edit_num_rays_per_batch,
    }
    seconds: dict[Phase, float] = {}

    def remedy() -> str:
        remedies = memory_remedies("training", phase, config.method_name, config.pipeline, device.type == "cuda")
        return f"try {' or '.join(remedies)}."

    phase = Phase.RECONSTRUCT
    try:
        with convert_memory_errors("while training was measured", remedy):
            reset_peak_memory(device)
            model = _build(options, device)
            step = _stepper(model, config, device)
            for phase in Phase:
                model.phase = phase
                seconds[phase] = mean_seconds(lambda: step(rays[phase]), device, STEPS)
                table[f"{phase.value} step ({rays[phase]} rays), s"] = seconds[phase]
            chunk = _random_rays(options.eval_num_rays_per_chunk, device)
            model.eval()
            with torch.no_grad():
                ray_seconds = mean_seconds(lambda: model(chunk), device, STEPS) / len(chunk)
    except WysError as error:
        return {**table, "speed": f"not measured: {error}"}, None
    return {**table, "render of a million rays, s": 1e6 * ray_seconds, **peak_memory(device)}, TrainingSpeed(
        seconds, ray_seconds
    )


def _build(options: WysModelConfig, device: torch.device) -> WysModel:
    box = SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3]))
    model: WysModel = options.setup(scene_box=box, num_train_data=NUM_CAMERAS, metadata={})
    model.to(device)
    model.proposal_sampler._step = LATE_STEP
    return model


def _stepper(model: WysModel, config: WysTrainerConfig, device: torch.device) -> Callable[[int], None]:
    """Return a function that trains a step on a number of rays, as nerfstudio's trainer does."""
    half = config.mixed_precision and device.type == "cuda"
    parameters = [parameter for group in model.get_param_groups().values() for parameter in group]
    optimizer, scaler = torch.optim.Adam(parameters, lr=1e-3, eps=1e-15), GradScaler(device.type, enabled=half)

    def step(count: int) -> None:
        model.train()
        rays = _random_rays(count, device)
        batch = {
            "image": torch.rand(count, 3, device=device),
            "relevance": torch.rand(count, 1, device=device),
            "patch_size": config.pipeline.datamanager.edit_patch_size,
        }
        optimizer.zero_grad(set_to_none=True)
        model.proposal_sampler.step_cb(LATE_STEP)
        with torch.autocast(device.type, enabled=half):
            outputs = model(rays)
            losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
        scaler.scale(sum(losses.values())).backward()  # type: ignore
        scaler.step(optimizer)
        scaler.update()

    return step


def _random_rays(count: int, device: torch.device) -> RayBundle:
    """Return rays from within the scene in all directions."""
    directions = F.normalize(torch.randn(count, 3, device=device), dim=-1)
    cameras = torch.randint(NUM_CAMERAS, (count, 1), device=device)
    return RayBundle(0.3 * torch.rand_like(directions), directions, torch.ones_like(directions[:, :1]), cameras)


def num_edits(options: WysPipelineConfig) -> int:
    """Return the number of edits of a run; at most, because views with an empty mask are not edited."""
    return math.ceil(options.edit_steps / options.edit_every) * options.edit_count


def estimate_run(
    config: WysTrainerConfig, views: int, editing: Optional[EditorSpeed], training: Optional[TrainingSpeed]
) -> Table:
    """Return the minutes of each part of a run; at most, because views with an empty mask are neither rendered whole nor edited.

    Args:
        config: Options of the method.
        views: Number of training views.
        editing: Speed of the editor; None if it is not known.
        training: Speed of training; None if it is not known.
    """
    options, schedule = config.pipeline, config.pipeline.schedule()
    steps = dict(zip(Phase, (schedule.reconstruct_steps, schedule.localize_steps, schedule.edit_steps)))
    edits = num_edits(options)
    minutes: dict[str, Optional[float]] = {
        f"{phase.value} ({count} steps)": None if training is None else count * training.step_seconds[phase] / 60
        for phase, count in steps.items()
    }
    minutes["relevance maps"] = None if editing is None else views * editing.map_seconds / 60
    minutes[f"edits (at most {edits} views)"] = None
    if editing is not None and training is not None:
        render_seconds = editing.size[0] * editing.size[1] * training.ray_seconds
        minutes[f"edits (at most {edits} views)"] = edits * (render_seconds + editing.edit_seconds) / 60
    known = [value for value in minutes.values() if value is not None]
    minutes["all"] = sum(known) if len(known) == len(minutes) else None
    return {name: "not measured" if value is None else value for name, value in minutes.items()}
