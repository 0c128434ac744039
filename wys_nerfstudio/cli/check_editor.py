"""Speed, memory and precision of an editor, measured on a picture of the toy world."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.cli.check_machine import NOT_DOWNLOADED, editor_place
from wys_nerfstudio.cli.check_measure import mean_seconds, peak_memory, reset_peak_memory, synchronize
from wys_nerfstudio.cli.check_table import Table
from wys_nerfstudio.demo.render import render_edits
from wys_nerfstudio.demo.scene import demo_cameras
from wys_nerfstudio.demo.world import DEMO_SEEDS, sample_scenes
from wys_nerfstudio.editing import Editor, EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.edit import WITH_AND_WITHOUT_TEXT, latent_size
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.loading import Precision, load_profile, resolve_dtype
from wys_nerfstudio.editing.sampling import ProgressCallback, add_noise, no_progress, seeded_noise
from wys_nerfstudio.evaluation.metrics import intersection_over_union, psnr
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import convert_memory_errors

INSTRUCTION = "turn the bear into a panda"
STEPS = 4
"""Diffusion steps of the measured edit."""
REPEATS = 3
"""Measured calls of everything else, after one for warmup."""
STRENGTHS = 99
"""Strengths, evenly spaced, over which the number of diffusion steps of an edit is averaged."""


@dataclass
class EditorSpeed:
    """Speed of an editor with the settings of a method."""

    size: tuple[int, int]
    """Height and width in pixels at which the picture is edited."""
    map_seconds: float
    """Seconds of a relevance map, made alone."""
    step_seconds: float
    """Seconds of a diffusion step of one view, all guidance branches included."""
    coding_seconds: float
    """Seconds of encoding and decoding in an edit of one view."""
    mean_steps: float
    """Mean number of diffusion steps of an edit."""

    @property
    def edit_seconds(self) -> float:
        """Seconds of an edit of one view."""
        return self.mean_steps * self.step_seconds + self.coding_seconds


@dataclass
class Sample:
    """What an editor makes of the picture, on the CPU."""

    raw_map: Float[Tensor, "1 lh lw"]
    """Raw relevance map in the editor's own precision, with one noise sample."""
    edited: Float[Tensor, "h w 3"]
    """The picture after an edit of `STEPS` steps without a mask."""


def measure_editor(
    name: str, device: torch.device, precision: Precision, options: WysPipelineConfig
) -> tuple[Table, Optional[EditorSpeed]]:
    """Load an editor, measure it, and compare its precision with float32.

    Args:
        name: The editor's name.
        device: Its device.
        precision: Its precision.
        options: Options of the method whose maps and edits are made.

    Returns:
        A table, and the speed; None if the editor is not downloaded, does not load, or needs more memory.
    """
    if editor_place(name) is None:
        return {"speed": f"not measured: {NOT_DOWNLOADED}"}, None
    table: Table = {}
    try:
        dtype = resolve_dtype(precision, device, load_profile(name))
        table["precision"] = dtype
        with memory_errors(device):
            reset_peak_memory(device)
            editor = load_editor(name, device, precision)
            speed, sample = _measure(editor, options)
            peak = peak_memory(device)
    except WysError as error:
        return {**table, "speed": f"not measured: {error}"}, None
    table |= {
        "edited at": f"{speed.size[1]} x {speed.size[0]} pixels",
        "relevance map, s": speed.map_seconds,
        "diffusion step, s": speed.step_seconds,
        "encoding and decoding, s": speed.coding_seconds,
        f"edit ({speed.mean_steps:.1f} steps on average), s": speed.edit_seconds,
        **peak,
    }
    if dtype != "float32":
        del editor
        reset_peak_memory(device)
        try:
            with memory_errors(device):
                exact = _sample(load_editor(name, device, "float32"), options)
            table |= agreement(sample, exact, options)
        except WysError as error:
            table["agreement with float32"] = f"not measured: {error}"
    return table, speed


def memory_errors(device: torch.device) -> AbstractContextManager[None]:
    """Context in which running out of memory is an error of one sentence."""
    elsewhere = "--device cpu or " if device.type == "cuda" else ""
    return convert_memory_errors("while the editor was measured", lambda: f"try {elsewhere}--editor embedded.")


def agreement(sample: Sample, exact: Sample, options: WysPipelineConfig) -> Table:
    """Return how close maps, masks and edits of a precision are to those of float32."""
    height, width = sample.edited.shape[:2]
    raw_maps, factor = torch.cat([sample.raw_map, exact.raw_map]), options.relevance_outlier_factor
    maps = relevance.upsample(raw_maps, height, width, outlier_factor=factor)
    masks = relevance.threshold(maps, options.mask_threshold)
    return {
        "correlation of maps with float32": torch.corrcoef(maps.flatten(1))[0, 1].item(),
        "IoU of masks with float32": intersection_over_union(masks[0], masks[1]),
        "PSNR of edits against float32, dB": psnr(sample.edited, exact.edited),
    }


def _picture() -> Float[Tensor, "h w 3"]:
    scene = sample_scenes([DEMO_SEEDS[0]])
    with torch.no_grad():
        return render_edits(scene, demo_cameras(scene, 1, 160, 128))[0, -1].float() / 255


def _measure(editor: Editor, options: WysPipelineConfig) -> tuple[EditorSpeed, Sample]:
    picture, settings = _picture(), options.edit_settings(RunSettings.from_options(options), editor.profile)
    size = settings.size_for(editor, *picture.shape[:2])

    def make_map() -> None:
        list(
            relevance_maps(
                editor,
                picture[None],
                INSTRUCTION,
                noise_level=settings.relevance_noise_level,
                num_samples=settings.relevance_num_samples,
                seeds=[0],
                resolution=settings.resolution,
            )
        )

    map_seconds = mean_seconds(make_map, editor.device, REPEATS)
    time_edit(editor, options)
    step_seconds, coding_seconds = time_edit(editor, options)
    speed = EditorSpeed(size, map_seconds, step_seconds, coding_seconds, mean_steps(editor, options))
    return speed, _sample(editor, options)


def mean_steps(editor: Editor, options: WysPipelineConfig) -> float:
    """Return the mean number of diffusion steps of an edit over all strengths of a run."""
    settings = options.edit_settings(RunSettings.from_options(options), editor.profile)
    latent_size = editor.latent_size(*settings.size_for(editor, *_picture().shape[:2]))
    strengths = torch.linspace(options.min_strength, options.max_strength, STRENGTHS).tolist()
    counts = [len(editor.noise_levels(strength, settings.diffusion_steps, latent_size)) - 1 for strength in strengths]
    return sum(counts) / len(counts)


def time_edit(editor: Editor, options: WysPipelineConfig) -> tuple[float, float]:
    """Edit the picture in `STEPS` steps; return the seconds of a diffusion step, and of encoding and decoding."""
    picture, settings = _picture(), options.edit_settings(RunSettings.from_options(options), editor.profile)
    times: list[float] = []

    def step_done(_done: int, _total: int) -> None:
        synchronize(editor.device)
        times.append(time.perf_counter())

    began = time.perf_counter()
    _edit(editor, picture, settings, step_done)
    synchronize(editor.device)
    seconds = time.perf_counter() - began
    step_seconds = (times[-1] - times[0]) / (len(times) - 1)
    return step_seconds, max(0.0, seconds - len(times) * step_seconds)


def _edit(editor: Editor, picture: Tensor, settings: EditSettings, step_done: ProgressCallback = no_progress) -> Tensor:
    everywhere = torch.ones(1, *picture.shape[:2], dtype=torch.bool)
    few_steps = replace(settings, diffusion_steps=STEPS)
    return edit_images(
        editor,
        picture[None],
        picture[None],
        everywhere,
        INSTRUCTION,
        few_steps,
        strength=1.0,
        seeds=[0],
        on_progress=step_done,
    )[0]


def _sample(editor: Editor, options: WysPipelineConfig) -> Sample:
    picture, settings = _picture(), options.edit_settings(RunSettings.from_options(options), editor.profile)
    size = settings.size_for(editor, *picture.shape[:2])
    encoding = editor.encode(resize_images(picture[None].to(editor.device), *size))
    level = editor.noise_level(settings.relevance_noise_level, latent_size(encoding.latents))
    noise = seeded_noise([0], encoding.latents.shape[1:], editor.device)
    predict = editor.predictor(encoding.condition, INSTRUCTION, WITH_AND_WITHOUT_TEXT)
    noisy = add_noise(encoding.latents, noise, level)
    raw_map = relevance.noise_difference(*(editor.split(p, noisy, level)[1] for p in predict(noisy, level)))
    return Sample(raw_map.cpu(), _edit(editor, picture, settings).cpu())
