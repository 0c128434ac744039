"""Speed of edits, relevance maps and the edit phase, compared with Instruct-NeRF2NeRF's implementation of the same work.

The comparison is a slow reference in this file that follows Instruct-NeRF2NeRF's loop, and for relevance the method authors'
release: one view at a time, all diffusion steps at any noise level, always three branches, sliced attention, single-precision
weights (under autocast on a GPU), 20 diffusion steps by DDIM, the condition encoded again for every edit (here once per view, before
the measurement), one relevance map per edit, whole views rendered in train mode with all outputs, edits between the forward and the
backward pass of a step, and nerfstudio's own torch hash encoding. Both use the same networks, views, seeds and settings, are measured
alternately, and are compared by their medians. On a CPU, CPU seconds of the process are measured, because other work on the machine
disturbs them less than wall-clock time; with OMP_NUM_THREADS=1 they equal the wall-clock time on an idle machine.

    wys demo-scene SCENE && ns-train wys-tiny --data SCENE --instruction "turn the bear into a panda" --vis tensorboard
    python tests/benchmarks/speed.py SCENE RUN/wys/captured.ckpt

`--editor full-size` measures edits and maps with random weights in InstructPix2Pix's sizes, at 512 pixels.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Optional

import architectures
import torch
import tyro
from jaxtyping import Float
from meta_device import operation_counter
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.models.base_model import Model
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.config import wys, wys_tiny
from wys_nerfstudio.editing import EMBEDDED, EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.compilation import compile_editor
from wys_nerfstudio.editing.editor import NoiseLevel, resize_images
from wys_nerfstudio.editing.encoding_cache import EncodingCache
from wys_nerfstudio.editing.loading import resolve_dtype
from wys_nerfstudio.editing.sampling import add_noise, apply_guidance, seeded_noise
from wys_nerfstudio.editing.stable_diffusion import PROFILE, StableDiffusionEditor
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training import schedule
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.encodings import FastHashEncoding, use_fast_encodings
from wys_nerfstudio.utils.visualization import read_png

FULL_SIZE = "full-size"
SLOW_STEPS = 20
"""Diffusion steps of Instruct-NeRF2NeRF, where the method gives none."""


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Scene in nerfstudio's format."""
    run: tyro.conf.Positional[Optional[Path]] = None
    """Run or checkpoint of that scene, for the edit phase; without it only edits and maps are measured."""
    editor: str = EMBEDDED
    """Editor, or "full-size" for random weights in InstructPix2Pix's sizes."""
    instruction: str = "turn the bear into a panda"
    """What to change."""
    device: str = "cpu"
    """Device of editor and scene."""
    views: int = 8
    """Number of views that are edited and have relevance maps."""
    batch: int = 4
    """Views per edit of this package; the comparison edits one at a time."""
    repeats: int = 3
    """Measured rounds, after one for warmup."""
    compile: bool = False
    """Compile this package's UNet first, and measure the time of it."""
    output: Path = Path("speed.json")
    """JSON file to write; the table is also printed as Markdown."""


@dataclass
class Row:
    """One measured task: minimum, median and maximum seconds per view over all rounds."""

    work: str
    """Name of the task."""
    slow: tuple[float, float, float]
    """Seconds of the slow reference."""
    ours: tuple[float, float, float]
    """Seconds of this package."""

    @property
    def ratio(self) -> float:
        """Speedup of this package: ratio of the medians."""
        return self.slow[1] / self.ours[1]


# ------------------------------------------------------------------------------------------------------ the slow reference


def slow_editor(editor: StableDiffusionEditor) -> StableDiffusionEditor:
    """Return a copy of an editor in single precision with sliced attention."""
    unet, vae, text_encoder = (copy.deepcopy(net).float() for net in (editor.unet, editor.vae, editor.text_encoder))
    unet.set_attention_slice("auto")
    return StableDiffusionEditor(
        editor.name,
        unet,
        vae,
        text_encoder,
        editor.tokenizer,
        editor.alphas_cumprod,
        editor.final_alpha,
        editor.prediction_type,
    )


def slow_noise(
    editor: StableDiffusionEditor,
    latents: Float[Tensor, "1 c lh lw"],
    level: NoiseLevel,
    condition: Float[Tensor, "1 c lh lw"],
    states: Float[Tensor, "3 tokens width"],
) -> Sequence[Float[Tensor, "1 c lh lw"]]:
    """Predict the noise of one view with all three branches: text and image, image only, neither."""
    conditions = torch.cat([condition, condition, torch.zeros_like(condition)])
    cuda = editor.device.type == "cuda"
    with torch.autocast("cuda", torch.float16) if cuda else nullcontext():
        return editor.predict(latents.repeat(3, 1, 1, 1), level, conditions, states).float().chunk(3)


def level_at(editor: StableDiffusionEditor, timestep: int) -> NoiseLevel:
    """Return the noise level of a timestep."""
    return editor.noise_levels(timestep / (editor.num_train_timesteps - 1), 1, (8, 8))[0]


def slow_states(editor: StableDiffusionEditor, instruction: str) -> Float[Tensor, "3 tokens width"]:
    """Encode the texts of the three branches."""
    return torch.cat([editor.encode_text(text) for text in (instruction, "", "")])


def slow_edit(
    editor: StableDiffusionEditor,
    render: Float[Tensor, "1 h w 3"],
    captured: Float[Tensor, "1 h w 3"],
    states: Float[Tensor, "3 tokens width"],
    settings: EditSettings,
    strength: float,
    seed: int,
) -> Float[Tensor, "1 h w 3"]:
    """Edit one view without a mask: all diffusion steps at any noise level, nothing cached.

    Args:
        editor: Result of `slow_editor`.
        render: The view that the edit starts from, in [0, 1].
        captured: The view that the edit is conditioned on, in [0, 1].
        states: Result of `slow_states`.
        settings: Guidance, steps and resolution.
        strength: Noise that the edit starts from, as a share of the diffusion.
        seed: Seed of the noise.
    """
    size = settings.size_for(editor, *render.shape[1:3])
    start, reference = (editor.encode(resize_images(x.to(editor.device), *size)) for x in (render, captured))
    noise = seeded_noise([seed], start.latents.shape[1:], editor.device)
    final = editor.noise_levels(strength, 1, (8, 8))[-1]
    last, steps = editor.num_train_timesteps - 1, settings.diffusion_steps
    first = max(1, round(strength * last))
    levels = [level_at(editor, max(1, first - i * first // steps)) for i in range(steps)]
    latents = add_noise(start.latents, noise, levels[0])
    guidance = editor.branches(settings.guidance_scale, settings.image_guidance_scale)
    for level, next_level in zip(levels, [*levels[1:], final]):
        predicted = apply_guidance(slow_noise(editor, latents, level, reference.condition, states), guidance)
        latents = add_noise(*editor.split(predicted, latents, level), next_level)
    return resize_images(editor.decode(latents), *render.shape[1:3])


def slow_map(
    editor: StableDiffusionEditor,
    render: Float[Tensor, "1 h w 3"],
    captured: Float[Tensor, "1 h w 3"],
    states: Float[Tensor, "3 tokens width"],
    settings: EditSettings,
    seed: int,
) -> Float[Tensor, "1 lh lw"]:
    """Compute the relevance map of one view as in the method authors' release: three branches instead of two, both images
    encoded for every map.

    Args:
        editor: Result of `slow_editor`.
        render: The view that the prediction is conditioned on, in [0, 1].
        captured: The view that noise is added to, in [0, 1].
        states: Result of `slow_states`.
        settings: Resolution.
        seed: Seed of the noise.
    """
    size = settings.size_for(editor, *render.shape[1:3])
    clean, reference = (editor.encode(resize_images(x.to(editor.device), *size)) for x in (captured, render))
    noise = seeded_noise([seed], clean.latents.shape[1:], editor.device)
    level = editor.noise_level(0.8, (8, 8))
    branches = slow_noise(editor, add_noise(clean.latents, noise, level), level, reference.condition, states)
    return relevance.noise_difference(branches[0], branches[1])


# ---------------------------------------------------------------------------------------------------- measurement


def measure_alternately(
    work: str, slow: Callable[[int], None], ours: Callable[[int], None], repeats: int, views: int
) -> Row:
    """Measure two functions alternately, after one call of each for warmup.

    Args:
        work: Name of the task.
        slow: The slow reference; receives the number of the round.
        ours: This package; receives the number of the round.
        repeats: Number of measured rounds.
        views: Number of views per call.
    """
    times: dict[Callable[[int], None], list[float]] = {slow: [], ours: []}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for repeat in range(repeats + 1):
        for function in (slow, ours):
            started = clock()
            function(repeat)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat > 0:
                times[function].append((clock() - started) / views)
    return Row(work, *((min(t), statistics.median(t), max(t)) for t in times.values()))


def editing_rows(
    editor: StableDiffusionEditor,
    slow: StableDiffusionEditor,
    images: Float[Tensor, "b h w 3"],
    options: Options,
    config: WysPipelineConfig,
) -> list[Row]:
    """Measure edits of all views from the noise levels of a run, and their relevance maps.

    Args:
        editor: This package's editor.
        slow: Result of `slow_editor`.
        images: Views in [0, 1].
        options: Options of the benchmark.
        config: Options of the method.
    """
    count, settings = len(images), config.edit_settings(RunSettings.from_options(config), editor.profile)
    slow_settings = replace(settings, diffusion_steps=config.diffusion_steps or SLOW_STEPS)
    cache = EncodingCache()
    states = slow_states(slow, options.instruction)
    levels = config.min_strength, config.max_strength
    mask = torch.ones(images.shape[:3], dtype=torch.bool, device=images.device)

    def strength(repeat: int, view: int) -> float:
        # As in a run, views that are edited together start from the same noise level.
        number = repeat * count + view // options.batch
        return schedule.strength_of_edit(0, number, *levels)

    def edit_slow(repeat: int) -> None:
        for view in range(count):
            image = images[view : view + 1]
            slow_edit(slow, image, image, states, slow_settings, strength(repeat, view), view)

    def edit_ours(repeat: int) -> None:
        for first in range(0, count, options.batch):
            numbers = range(first, min(count, first + options.batch))
            part = slice(numbers.start, numbers.stop)
            edit_images(
                editor,
                images[part],
                images[part],
                mask[part],
                options.instruction,
                settings,
                strength=strength(repeat, first),
                seeds=list(numbers),
                encoded_reference=cache.encode(editor, images[part], numbers, settings.resolution),
            )

    def maps_slow(repeat: int) -> None:
        for view in range(count):
            image = images[view : view + 1]
            slow_map(slow, image, image, states, settings, view)

    def maps_ours(repeat: int) -> None:
        list(relevance_maps(editor, images, options.instruction, seeds=list(range(count))))

    scales = f"S_T {settings.guidance_scale:g}, S_I {settings.image_guidance_scale:g}"
    steps = f"{settings.diffusion_steps} instead of {slow_settings.diffusion_steps} steps"
    return [
        measure_alternately(f"edit, {scales}, {steps}", edit_slow, edit_ours, options.repeats, count),
        measure_alternately("relevance map", maps_slow, maps_ours, options.repeats, count),
    ]


def hash_encoding_row(device: str, repeats: int) -> Row:
    """Measure nerfstudio's torch hash encoding and this package's, in wys-tiny's size: forward and backward pass of one
    step's samples."""
    torch.manual_seed(0)
    slow = HashEncoding(num_levels=8, max_res=512, log2_hashmap_size=15, implementation="torch").to(device)
    fast = copy.deepcopy(slow)
    use_fast_encodings(fast)
    positions = torch.rand(24 * 1024, 3, device=device)
    passes = [
        lambda repeat, encoding=encoding: encoding(positions).square().sum().backward() for encoding in (slow, fast)
    ]
    return measure_alternately("hash encoding of 24,576 samples", passes[0], passes[1], repeats, views=1)


def build_trainer(options: Options, run: Path, method: WysPipelineConfig, localized: bool) -> WysTrainer:
    """Return a trainer of wys-tiny's scene at the first step of its edit phase.

    Args:
        options: Options of the benchmark.
        run: Base run.
        method: Options of the method whose edits, and steps from one edit to the next, are measured.
        localized: Whether relevance maps confine the edits.
    """
    config: WysTrainerConfig = copy.deepcopy(wys_tiny.config)  # type: ignore
    config.vis, config.machine.device_type = "tensorboard", torch.device(options.device).type  # type: ignore
    config.output_dir = options.output.parent / "speed-runs"
    config.pipeline.datamanager.data = options.scene
    config.pipeline.instruction, config.pipeline.base_run = options.instruction, run
    config.pipeline.localize_steps = 1
    config.pipeline.localization = "relevance-map" if localized else "none"  # the field would need training
    for name in ("guidance_scale", "image_guidance_scale", "diffusion_steps", "solver_order", "min_strength"):
        setattr(config.pipeline, name, getattr(method, name))
    config.pipeline.edit_every, config.pipeline.edit_count = method.edit_every * options.batch, options.batch
    config.set_timestamp()
    torch.manual_seed(0)
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    with trainer.train_lock:
        trainer.pipeline.session.enter_phase(Phase.LOCALIZE)
        trainer.pipeline.session.enter_phase(Phase.EDIT)
    return trainer


def train_steps(trainer: WysTrainer, first: int, count: int) -> None:
    """Train steps of the edit phase, with the edits that are due. The proposal networks are trained at every step.

    Args:
        trainer: The trainer.
        first: First step.
        count: Number of steps.
    """
    for step in range(first, first + count):
        trainer.pipeline.train()
        with trainer.train_lock:
            trainer.callbacks[0].func(step=step)
        trainer.train_iteration(step)


def edit_phase_row(
    options: Options,
    run: Path,
    method: WysPipelineConfig,
    editor: StableDiffusionEditor,
    slow: StableDiffusionEditor,
    localized: bool,
) -> Row:
    """Measure the edit phase of wys-tiny's scene per edited view: the steps from one edit to the next, and an edit. The slow
    reference has no masks.

    Args:
        options: Options of the benchmark.
        run: Base run.
        method: As for `build_trainer`.
        editor: This package's editor.
        slow: Result of `slow_editor`.
        localized: Whether relevance maps confine this package's edits.
    """
    ours, other = build_trainer(options, run, method, localized), build_trainer(options, run, method, localized=False)
    for module in other.pipeline.modules():
        if isinstance(module, FastHashEncoding):
            module.__class__ = HashEncoding  # nerfstudio's own
    settings = other.config.pipeline.edit_settings(other.pipeline.settings.current, PROFILE)
    settings = replace(settings, diffusion_steps=method.diffusion_steps or SLOW_STEPS)
    states = slow_states(slow, options.instruction)
    steps = ours.config.pipeline.edit_every
    first_step = ours.pipeline.session.schedule.edit_start

    def train_ours(repeat: int) -> None:
        train_steps(ours, first_step + repeat * steps, steps)

    def train_slow(repeat: int) -> None:
        data, model = other.pipeline.datamanager, other.pipeline.scene_model
        for i in range(steps):
            step = first_step + repeat * steps + i
            other.pipeline.train()
            other.optimizers.zero_grad_all()
            losses = other.pipeline.get_train_loss_dict(step)[1]
            if i % method.edit_every == 0:
                number = (repeat * steps + i) // method.edit_every
                view = schedule.view_of_edit(0, number, data.num_views)
                camera = data.train_dataset.cameras[view : view + 1].to(model.device)
                with torch.no_grad():
                    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
                    model.phase = Phase.RECONSTRUCT  # renders without the relevance head
                    render = Model.get_outputs_for_camera_ray_bundle(model, rays)["rgb"][None].clamp(0, 1)
                    model.phase = Phase.EDIT
                    captured = data.captured_views([view])
                    level = schedule.strength_of_edit(
                        0, number // options.batch, method.min_strength, method.max_strength
                    )
                    slow_map(slow, render, captured, states, settings, number)
                    data.set_view(view, slow_edit(slow, render, captured, states, settings, level, number)[0])
            torch.stack(list(losses.values())).sum().backward()
            other.optimizers.optimizer_step_all()
            other.optimizers.scheduler_step_all(step)

    ours.pipeline._editor = editor
    scales = f"S_T {settings.guidance_scale:g}, {method.edit_every} steps and an edit"
    work = f"edit phase, {scales} of a {'masked' if localized else 'whole'} view"
    return measure_alternately(work, train_slow, train_ours, options.repeats, options.batch)


def full_size_editor(device: str) -> StableDiffusionEditor:
    """Return an editor with InstructPix2Pix's architecture, random weights and the embedded editor's tokenizer."""
    small: Any = load_editor(EMBEDDED, device)
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, resolve_dtype("auto", device, PROFILE))
    networks = {
        name: network.to(device, dtype).eval().requires_grad_(False)
        for name, network in architectures.stable_diffusion().items()
    }
    return StableDiffusionEditor(
        FULL_SIZE,
        **networks,
        tokenizer=small.tokenizer,
        alphas_cumprod=small.alphas_cumprod,
        final_alpha=small.final_alpha,
        prediction_type="epsilon",
    )


def unet_flops(editor: StableDiffusionEditor, images: Float[Tensor, "b h w 3"]) -> float:
    """Return the number of floating-point operations of the UNet for one branch of one view."""
    encoding = editor.encode(images[:1])
    with operation_counter() as counter:
        editor.predict(encoding.latents, editor.noise_level(0.5, (8, 8)), encoding.condition, editor.encode_text(""))
    return float(counter.get_total_flops())


def compile_unet(editor: StableDiffusionEditor, images: Float[Tensor, "b h w 3"], options: Options) -> float:
    """Compile the UNet for the shape of a batch, and return the time of compilation in seconds."""
    compile_editor(editor, cuda_graphs=True)
    started = time.perf_counter()
    latents = editor.encode(images[: options.batch]).latents.repeat(3, 1, 1, 1)
    editor.predict(
        latents, editor.noise_level(0.5, (8, 8)), latents, editor.encode_text("").expand(len(latents), -1, -1)
    )
    return time.perf_counter() - started


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown: medians, with minimum and maximum in parentheses."""

    def cell(times: tuple[float, float, float]) -> str:
        return f"{times[1]:.3f} ({times[0]:.3f} to {times[2]:.3f})"

    lines = ["| task, seconds per view | Instruct-NeRF2NeRF | wys | speedup |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.work} | {cell(r.slow)} | {cell(r.ours)} | {r.ratio:.1f} |" for r in rows)])


def measure(options: Options) -> dict[str, Any]:
    """Measure all tasks that the options select, and return the results as plain data."""
    full = options.editor == FULL_SIZE
    editor = full_size_editor(options.device) if full else load_editor(options.editor, options.device)
    slow = slow_editor(editor)
    files = sorted((options.scene / "images").glob("*.png"))[: options.views]
    images = torch.stack([read_png(file) for file in files]).to(options.device)
    if full:
        images = resize_images(images, 512, 512)
    result: dict[str, Any] = {"unet_gflop": unet_flops(editor, images) / 1e9}
    if options.compile:
        result["compile_seconds"] = compile_unet(editor, images, options)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    default, tiny = (method.config.pipeline for method in (wys, wys_tiny))
    rows = editing_rows(editor, slow, images, options, default)  # type: ignore
    if not full:
        rows += editing_rows(editor, slow, images, options, tiny)[:1]  # type: ignore
    rows.append(hash_encoding_row(options.device, options.repeats))
    if options.run is not None:
        rows += [
            edit_phase_row(options, options.run, method, editor, slow, localized)  # type: ignore
            for method in (default, tiny)
            for localized in (False, True)
        ]
    if torch.cuda.is_available():
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return result | {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {device}",
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in asdict(options).items()},
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        "table": table(rows),
    }


def main(options: Options) -> None:
    """Measure, print the table and write the JSON file."""
    result = measure(options)
    print(result.pop("table"))
    options.output.write_text(json.dumps(result, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
