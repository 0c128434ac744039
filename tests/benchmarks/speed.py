"""Edits, relevance maps and the whole edit phase, beside Instruct-NeRF2NeRF's way of doing the same work.

The other way is written out here as a slow twin, after that system's loop (for relevance after that of the authors'
release): one view at a time, always all diffusion steps, always three branches, sliced attention, single-precision weights
(under autocast on a GPU), the condition encoded anew at every edit, a map at every visit, whole views rendered in train mode
with all outputs, the edit between a step's forward and backward pass, nerfstudio's own torch hash encoding. Both ways use the same networks, views, seeds and
settings; they take turns, and medians are compared. On a CPU the process's CPU seconds are counted, which other work on the
machine disturbs less than the clock's (OMP_NUM_THREADS=1 makes them those of an idle machine).

    wys demo-scene SCENE && ns-train wys-tiny --data SCENE --instruction "turn the bear into a panda" --vis tensorboard
    python tests/benchmarks/speed.py SCENE RUN/wys/captured.ckpt

`--editor full-size` measures edits and maps with InstructPix2Pix's own sizes and random weights, at 512 pixels.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Optional

import torch
import tyro
from jaxtyping import Float
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.models.base_model import Model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wys_nerfstudio import relevance
from wys_nerfstudio.config import wys, wys_tiny
from wys_nerfstudio.editing import EMBEDDED, EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.editor import NoiseLevel, resize_images
from wys_nerfstudio.editing.sampling import add_noise, apply_guidance, seeded_noise
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training import schedule
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.encodings import FastHashEncoding, use_fast_encodings
from wys_nerfstudio.utils.visualization import read_png

FULL_SIZE = "full-size"


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Scene whose views are edited."""
    run: tyro.conf.Positional[Optional[Path]] = None
    """Run or checkpoint on that scene, for the edit phase; without it edits and maps alone are measured."""
    editor: str = EMBEDDED
    """Editor, or "full-size" for InstructPix2Pix's sizes with random weights."""
    instruction: str = "turn the bear into a panda"
    """What to change."""
    device: str = "cpu"
    """Device of editor and scene."""
    views: int = 8
    """Views that are edited, and that maps are made of."""
    batch: int = 4
    """Views that this package edits together."""
    repeats: int = 3
    """Turns of each way."""
    compile: bool = False
    """Compile this package's UNet first, and tell how long that takes."""
    output: Path = Path("speed.json")
    """JSON to write; Markdown goes to the terminal."""


@dataclass
class Row:
    """One piece of work, done both ways; seconds per view, the smallest, median and largest of all turns."""

    work: str
    """What was done."""
    slow: tuple[float, float, float]
    """Instruct-NeRF2NeRF's way."""
    ours: tuple[float, float, float]
    """This package's way."""

    @property
    def ratio(self) -> float:
        """How many times as fast, by medians."""
        return self.slow[1] / self.ours[1]


# ------------------------------------------------------------------------------------------------------ the slow reference


def as_slow(editor: StableDiffusionEditor) -> StableDiffusionEditor:
    """The same networks in single precision and with sliced attention."""
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
    editor: StableDiffusionEditor, latents: Tensor, level: NoiseLevel, condition: Tensor, states: Tensor
) -> Sequence[Tensor]:
    """With text and image, with the image, with neither: always all three, for one view."""
    conditions = torch.cat([condition, condition, torch.zeros_like(condition)])
    cuda = editor.device.type == "cuda"
    with torch.autocast("cuda", torch.float16) if cuda else nullcontext():
        return editor.predict_noise(latents.repeat(3, 1, 1, 1), level, conditions, states).float().chunk(3)


def level_at(editor: StableDiffusionEditor, timestep: int) -> NoiseLevel:
    """The noise level of a timestep."""
    return editor.noise_levels(timestep / (editor.num_train_timesteps - 1), 1)[0]


def slow_states(editor: StableDiffusionEditor, instruction: str) -> Float[Tensor, "3 tokens width"]:
    """Text states of the three branches; they are made once."""
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
    """One view, all steps wherever it starts, nothing remembered; there is no mask."""
    size = settings.size_for(editor, *render.shape[1:3])
    start, kept = (editor.encode(resize_images(x.to(editor.device), *size)) for x in (render, captured))
    noise = seeded_noise([seed], start.latents.shape[1:], editor.device)
    final = editor.noise_levels(strength, 1)[-1]
    last, steps = editor.num_train_timesteps - 1, settings.diffusion_steps
    first = max(1, round(strength * last))
    levels = [level_at(editor, max(1, first - i * first // steps)) for i in range(steps)]
    latents = add_noise(start.latents, noise, levels[0])
    guidance = editor.branches(settings.guidance_scale, settings.image_guidance_scale)
    for now, following in zip(levels, [*levels[1:], final]):
        predicted = apply_guidance(slow_noise(editor, latents, now, kept.condition, states), guidance)
        latents = add_noise(*editor.split(predicted, latents, now), following)
    return resize_images(editor.decode(latents), *render.shape[1:3])


def slow_map(
    editor: StableDiffusionEditor, render: Tensor, captured: Tensor, states: Tensor, settings: EditSettings, seed: int
) -> Float[Tensor, "1 lh lw"]:
    """The release's map of a visit: three branches where two are needed, both pictures encoded anew."""
    size = settings.size_for(editor, *render.shape[1:3])
    clean, kept = (editor.encode(resize_images(x.to(editor.device), *size)) for x in (captured, render))
    noise = seeded_noise([seed], clean.latents.shape[1:], editor.device)
    level = editor.noise_level(0.8)
    branches = slow_noise(editor, add_noise(clean.latents, noise, level), level, kept.condition, states)
    return relevance.noise_difference(branches[0], branches[1])


# ------------------------------------------------------------------------------------------------------- measuring


def in_turns(work: str, slow: Callable[[int], None], ours: Callable[[int], None], repeats: int, views: int) -> Row:
    """Both ways once to warm up, then in turns; each is handed the number of its turn."""
    times: dict[Callable[[int], None], list[float]] = {slow: [], ours: []}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for turn in range(repeats + 1):
        for way in (slow, ours):
            began = clock()
            way(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 0:
                times[way].append((clock() - began) / views)
    spread = [(min(t), statistics.median(t), max(t)) for t in times.values()]
    return Row(work, *spread)


def editing_rows(
    editor: StableDiffusionEditor,
    slow: StableDiffusionEditor,
    pictures: Tensor,
    options: Options,
    config: WysPipelineConfig,
) -> list[Row]:
    """Edits of all views with a method's settings, from noise levels as its runs draw them, and their relevance maps."""
    count, settings = len(pictures), config.edit_settings()
    states = slow_states(slow, options.instruction)
    levels = config.min_strength, config.max_strength
    everywhere = torch.ones(pictures.shape[:3], dtype=torch.bool, device=pictures.device)

    def strength(turn: int, view: int) -> float:
        # Views that are edited together start from the same level, as in a run.
        number = turn * count + view // options.batch
        return schedule.strength_of_edit(0, number, *levels)

    def edit_slow(turn: int) -> None:
        for view in range(count):
            picture = pictures[view : view + 1]
            slow_edit(slow, picture, picture, states, settings, strength(turn, view), view)

    def edit_ours(turn: int) -> None:
        for first in range(0, count, options.batch):
            part = slice(first, first + options.batch)
            edit_images(
                editor,
                pictures[part],
                pictures[part],
                everywhere[part],
                options.instruction,
                settings,
                strength=strength(turn, first),
                seeds=list(range(first, min(count, first + options.batch))),
            )

    def maps_slow(turn: int) -> None:
        for view in range(count):
            picture = pictures[view : view + 1]
            slow_map(slow, picture, picture, states, settings, view)

    def maps_ours(turn: int) -> None:
        list(relevance_maps(editor, pictures, options.instruction, seeds=list(range(count))))

    scales = f"S_T {settings.guidance_scale:g}, S_I {settings.image_guidance_scale:g}"
    return [
        in_turns(f"edit, {scales}, {settings.diffusion_steps} steps", edit_slow, edit_ours, options.repeats, count),
        in_turns("relevance map of a visit", maps_slow, maps_ours, options.repeats, count),
    ]


def hash_encoding_row(device: str, repeats: int) -> Row:
    """nerfstudio's torch hash encoding and this package's, of wys-tiny's size: forward and backward of a step's samples."""
    torch.manual_seed(0)
    slow = HashEncoding(num_levels=8, max_res=512, log2_hashmap_size=15, implementation="torch").to(device)
    fast = copy.deepcopy(slow)
    use_fast_encodings(fast)
    positions = torch.rand(24 * 1024, 3, device=device)
    runs = [lambda turn, encoding=encoding: encoding(positions).square().sum().backward() for encoding in (slow, fast)]
    return in_turns("hash encoding of 24,576 samples", runs[0], runs[1], repeats, views=1)


def build_trainer(options: Options, run: Path, localized: bool) -> WysTrainer:
    """A trainer of wys-tiny right before its edit phase, edits in batches, under the views' relevance maps or nothing."""
    config: WysTrainerConfig = copy.deepcopy(wys_tiny.config)  # type: ignore
    config.vis, config.machine.device_type = "tensorboard", torch.device(options.device).type  # type: ignore
    config.output_dir = options.output.parent / "speed-runs"
    config.pipeline.datamanager.data = options.scene
    config.pipeline.instruction, config.pipeline.base_run = options.instruction, run
    config.pipeline.localize_steps = 1
    config.pipeline.localization = "relevance-map" if localized else "none"  # the field would have to be trained first
    config.pipeline.edit_every, config.pipeline.edit_count = 5 * options.batch, options.batch
    config.set_timestamp()
    torch.manual_seed(0)
    trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    with trainer.train_lock:
        trainer.pipeline.session.enter_phase(Phase.LOCALIZE)
        trainer.pipeline.session.enter_phase(Phase.EDIT)
    return trainer


def train_steps(trainer: WysTrainer, first: int, count: int) -> None:
    """Steps of training with the edits that are due at them; the proposal networks learn at every step."""
    for step in range(first, first + count):
        trainer.pipeline.train()
        with trainer.train_lock:
            trainer.callbacks[0].func(step=step)
        trainer.train_iteration(step)


def edit_phase_row(
    options: Options, run: Path, editor: StableDiffusionEditor, slow: StableDiffusionEditor, localized: bool
) -> Row:
    """Steps of the edit phase with their edits, per edited view: five steps and an edit. The other way has no masks."""
    ours, other = build_trainer(options, run, localized), build_trainer(options, run, localized=False)
    for module in other.pipeline.modules():
        if isinstance(module, FastHashEncoding):
            module.__class__ = HashEncoding  # nerfstudio's own
    settings = other.config.pipeline.edit_settings()
    states = slow_states(slow, options.instruction)
    steps = ours.config.pipeline.edit_every
    first_step = ours.pipeline.session.schedule.edit_start

    def turn_ours(turn: int) -> None:
        train_steps(ours, first_step + turn * steps, steps)

    def turn_slow(turn: int) -> None:
        data, model = other.pipeline.datamanager, other.pipeline.scene_model
        for i in range(steps):
            step = first_step + turn * steps + i
            other.pipeline.train()
            other.optimizers.zero_grad_all()
            losses = other.pipeline.get_train_loss_dict(step)[1]
            if i % 5 == 0:
                number = (turn * steps + i) // 5
                view = schedule.view_of_edit(0, number, data.num_views)
                camera = data.train_dataset.cameras[view : view + 1].to(model.device)
                with torch.no_grad():
                    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
                    model.phase = Phase.RECONSTRUCT  # a model without a second head
                    render = Model.get_outputs_for_camera_ray_bundle(model, rays)["rgb"][None].clamp(0, 1)
                    model.phase = Phase.EDIT
                    captured = data.captured_views([view])
                    level = schedule.strength_of_edit(0, number // options.batch, 0.5, 0.98)
                    slow_map(slow, render, captured, states, settings, number)
                    data.set_view(view, slow_edit(slow, render, captured, states, settings, level, number)[0])
            torch.stack(list(losses.values())).sum().backward()
            other.optimizers.optimizer_step_all()
            other.optimizers.scheduler_step_all(step)

    ours.pipeline._editor = editor
    what = "masked" if localized else "whole"
    return in_turns(f"edit phase of wys-tiny, {what} views", turn_slow, turn_ours, options.repeats, options.batch)


def full_size_editor(device: str) -> StableDiffusionEditor:
    """InstructPix2Pix's networks with random weights, and the embedded editor's words."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    small: Any = load_editor(EMBEDDED, device)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    unet = UNet2DConditionModel(sample_size=64, in_channels=8, cross_attention_dim=768)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, **blocks)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    networks = (net.to(device, dtype).eval().requires_grad_(False) for net in (unet, vae, text_encoder))
    return StableDiffusionEditor(
        FULL_SIZE, *networks, small.tokenizer, small.alphas_cumprod, small.final_alpha, "epsilon"
    )


def unet_flops(editor: StableDiffusionEditor, pictures: Tensor) -> float:
    """Floating-point operations of one branch of one view."""
    encoding = editor.encode(pictures[:1])
    with FlopCounterMode(display=False) as counter:
        editor.predict_noise(encoding.latents, editor.noise_level(0.5), encoding.condition, editor.encode_text(""))
    return float(counter.get_total_flops())


def compiled(editor: StableDiffusionEditor, pictures: Tensor, options: Options) -> float:
    """Compiles the UNet for the shape of a batch; returns the seconds that it took."""
    editor.unet = torch.compile(editor.unet)
    began = time.perf_counter()
    latents = editor.encode(pictures[: options.batch]).latents.repeat(3, 1, 1, 1)
    editor.predict_noise(latents, editor.noise_level(0.5), latents, editor.encode_text("").expand(len(latents), -1, -1))
    return time.perf_counter() - began


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown: medians, in brackets the smallest and the largest."""

    def cell(times: tuple[float, float, float]) -> str:
        return f"{times[1]:.3f} ({times[0]:.3f} to {times[2]:.3f})"

    lines = ["| work, seconds per view | Instruct-NeRF2NeRF's way | wys | times as fast |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.work} | {cell(r.slow)} | {cell(r.ours)} | {r.ratio:.1f} |" for r in rows)])


def measure(options: Options) -> dict[str, Any]:
    """Measures everything that the options ask for."""
    full = options.editor == FULL_SIZE
    editor = full_size_editor(options.device) if full else load_editor(options.editor, options.device)
    slow = as_slow(editor)
    files = sorted((options.scene / "images").glob("*.png"))[: options.views]
    pictures = torch.stack([read_png(file) for file in files]).to(options.device)
    if full:
        pictures = resize_images(pictures, 512, 512)
    result: dict[str, Any] = {"unet_gflop": unet_flops(editor, pictures) / 1e9}
    if options.compile:
        result["compile_seconds"] = compiled(editor, pictures, options)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    default, tiny = (method.config.pipeline for method in (wys, wys_tiny))
    rows = editing_rows(editor, slow, pictures, options, default)  # type: ignore
    if not full:
        rows += editing_rows(editor, slow, pictures, options, tiny)[:1]  # type: ignore
    rows.append(hash_encoding_row(options.device, options.repeats))
    if options.run is not None:
        rows += [edit_phase_row(options, options.run, editor, slow, localized) for localized in (False, True)]
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
    """Measures, prints the table and writes the JSON."""
    result = measure(options)
    print(result.pop("table"))
    options.output.write_text(json.dumps(result, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
