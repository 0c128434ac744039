"""Localization and edits of real photographs, with marks of an object as ground truth and a scripted editor.

No editor of photographs is needed: relevance maps are noisy versions of the marks, as those of the embedded editor are of the true
masks of its toy world, and the scripted editor recolors whatever its mask covers, differently in each edit. Renders of the held-out
views, whose marks are not used otherwise, are compared with their marks. Writes `photographs.json` and one contact sheet per seed.

    python tests/benchmarks/photographs.py CAPTURE MARKS --output DIR

CAPTURE is in nerfstudio's format; MARKS has a mask of the object for each of its views, named like the view and white inside, drawn by
hand or by a segmenter. The first run reconstructs the capture; those of other seeds start from its scene.
"""

import copy
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import torch
import tyro
from jaxtyping import Bool, Float
from nerfstudio.configs.method_configs import all_methods
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur
from views import resident_gib

from wys_nerfstudio import relevance
from wys_nerfstudio.config import wys
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.demo.score import load_captured_scene
from wys_nerfstudio.editing.editor import Branch, ImageEncoding, NoiseLevel, Predictor
from wys_nerfstudio.editing.stable_diffusion import PROFILE
from wys_nerfstudio.evaluation.metrics import average_precision, intersection_over_union, psnr
from wys_nerfstudio.trainer import WysTrainer, WysTrainerConfig
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.view_masks import read_masks
from wys_nerfstudio.utils.visualization import apply_colormap, contact_sheet, save_png

LATENT_FACTOR = 8
"""Pixels per latent of the scripted editor, as of Stable Diffusion."""
TINT = (0.45, 0.65, 1.2)
"""Color of recolored pixels of brightness 1."""


@dataclass
class Options:
    """Options of the benchmark."""

    capture: tyro.conf.Positional[Path]
    """Capture in nerfstudio's format."""
    marks: tyro.conf.Positional[Path]
    """Folder with a mask of the object for each view, held-out views included."""
    output: Path
    """Folder for photographs.json, the contact sheets and the runs."""
    method: str = "wys-tiny"
    """Method that is trained."""
    reconstruct_steps: int = 2000
    """Steps of the reconstruct phase."""
    localize_steps: int = 500
    """Steps of the localize phase."""
    edit_steps: int = 1000
    """Steps of the edit phase."""
    edit_every: int = 5
    """Steps from one edit to the next."""
    mask_threshold: float = 0.5
    """Pixels of at least this relevance are edited."""
    outlier_factor: float = wys.config.pipeline.relevance_outlier_factor  # type: ignore
    """Relevance is clamped at Q3 + this many interquartile ranges."""
    expectile: float = wys.config.pipeline.model.relevance_expectile  # type: ignore
    """Expectile of the relevance loss."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of maps, edits and relevance heads."""
    inside: float = 0.6
    """Mean relevance inside the marks, relative to a map's maximum; its noise is a third of it."""
    floor: float = 0.02
    """Mean relevance far from the marks; its noise is half of it."""
    halo: float = 0.7
    """Standard deviation of the blur of the marks, in latents."""
    missing: float = 0.15
    """Share of the maps that do not show the object."""
    blobs: float = 0.3
    """Share of the maps with a false blob, of 2 to 4 latents in radius and as relevant as the object."""
    jitter: float = 0.08
    """Standard deviation of the color of an edit, in each channel."""


class ScriptedEditor:
    """Editor that recolors whole images; their latents are their pixels in blocks, without loss.

    Args:
        jitter: Standard deviation of the color of an edit, in each channel.
    """

    name = "scripted"
    device = torch.device("cpu")
    network = torch.nn.Identity()
    profile = PROFILE

    def __init__(self, jitter: float) -> None:
        self._jitter = jitter

    def editing_size(self, height: int, width: int, resolution: Optional[int]) -> tuple[int, int]:
        """As for Stable Diffusion, without its limit of the change of proportions."""
        scale = (resolution or 512) / max(height, width) / LATENT_FACTOR
        return max(1, round(height * scale)) * LATENT_FACTOR, max(1, round(width * scale)) * LATENT_FACTOR

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents."""
        return height // LATENT_FACTOR, width // LATENT_FACTOR

    def full_precision(self) -> AbstractContextManager[None]:
        """All arithmetic is in float32."""
        return nullcontext()

    def encode_text(self, instruction: str) -> Tensor:
        """The instruction has no effect."""
        return torch.zeros(1)

    def encode(self, images: Float[Tensor, "b h w 3"]) -> ImageEncoding:
        """Arrange pixels in blocks."""
        latents = F.pixel_unshuffle(images.permute(0, 3, 1, 2) * 2 - 1, LATENT_FACTOR)
        return ImageEncoding(latents, latents)

    def decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b h w 3"]:
        """Arrange blocks as pixels."""
        return (F.pixel_shuffle(latents, LATENT_FACTOR).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    def noise_level(self, strength: float, size: tuple[int, int]) -> NoiseLevel:
        """A level of variance 1."""
        angle = torch.tensor(strength * torch.pi / 2)
        return NoiseLevel(float(angle.cos()), float(angle.sin()), strength)

    def noise_levels(self, strength: float, num_steps: int, size: tuple[int, int]) -> list[NoiseLevel]:
        """Evenly spaced levels."""
        steps = max(1, round(strength * num_steps))
        levels = [self.noise_level(strength * i / steps, size) for i in range(steps, 0, -1)]
        return [*levels, NoiseLevel(1.0, 0.0, 0.0)]

    def branches(self, guidance_scale: float, image_guidance_scale: float) -> list[Branch]:
        """One branch with all conditions."""
        return [Branch(text=True, image=True, scale=1.0)]

    def predictor(self, condition: Any, instruction: str, branches: Sequence[Branch]) -> Predictor:
        """Predict the noise that leads to recolored images, in colors that the first latents determine; without text to the images."""
        images = self.decode(condition)
        targets: list[Tensor] = []

        def predict(latents: Tensor, level: NoiseLevel) -> Sequence[Tensor]:
            if not targets:
                seeds = [int(values.abs().sum().double() * 1e4) for values in latents]
                colors = [torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
                recolored = recolor(images) + self._jitter * torch.stack(colors)[:, None, None]
                targets.append(self.encode(recolored.clamp(0, 1)).latents)
            clean = (targets[0] if branch.text else condition for branch in branches)
            return [(latents - level.signal * values) / level.noise for values in clean]

        return predict

    def split(
        self, prediction: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], level: NoiseLevel
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Split noisy latents into clean latents and noise."""
        return (latents - level.noise * prediction) / level.signal, prediction


def recolor(images: Float[Tensor, "*b h w 3"]) -> Float[Tensor, "*b h w 3"]:
    """Return images in shades of one color, the intended edit."""
    return (images.mean(dim=-1, keepdim=True) * torch.tensor(TINT)).clamp(0, 1)


def noisy_maps(
    marks: Bool[Tensor, "n h w"], size: tuple[int, int], options: Options, seed: int
) -> Float[Tensor, "n lh lw"]:
    """Return raw relevance maps of marked views.

    Args:
        marks: Marks of the object.
        size: Height and width of the maps.
        options: Options of the benchmark.
        seed: Seed of the noise.
    """
    random = torch.Generator().manual_seed(seed)
    coverage = F.adaptive_avg_pool2d(marks[:, None].float(), size)
    relevant = gaussian_blur(coverage, 2 * round(3 * options.halo) + 1, options.halo)[:, 0]
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    for relevance_map in relevant:
        missing, blob, y, x, radius = torch.rand(5, generator=random).tolist()
        if missing < options.missing:
            relevance_map.zero_()
        if blob < options.blobs:
            distance = ((rows - y * size[0]) ** 2 + (columns - x * size[1]) ** 2).sqrt()
            torch.maximum(relevance_map, (2 + 2 * radius - distance + 0.5).clamp(0, 1), out=relevance_map)
    inner, outer = (torch.randn(relevant.shape, generator=random) for _ in range(2))
    noisy = options.inside * (1 + inner / 3) * relevant + options.floor * (1 + outer / 2)
    return noisy.clamp_min(0)


@dataclass
class Marked:
    """Marks of a split, and its maps."""

    marks: Bool[Tensor, "n h w"]
    """Marks at the size of the views."""
    maps: Float[Tensor, "n lh lw"]
    """Raw relevance maps."""


def train(options: Options, seed: int, base: Optional[Path]) -> tuple[WysTrainer, Marked, dict[str, float]]:
    """Train a run with the scripted editor and noisy maps.

    Args:
        options: Options of the benchmark.
        seed: Seed of the run.
        base: Scene to start from; None to reconstruct it.

    Returns:
        The trainer; marks and maps of the held-out views; seconds of each phase and peak memory in GiB.
    """
    config: WysTrainerConfig = copy.deepcopy(all_methods[options.method])  # type: ignore
    config.vis, config.machine.device_type, config.machine.seed = "tensorboard", "cpu", seed  # type: ignore
    config.output_dir, config.pipeline.datamanager.data = options.output / "runs", options.capture
    config.pipeline.instruction, config.pipeline.base_run, config.pipeline.seed = "make it blue", base, seed
    config.pipeline.reconstruct_steps, config.pipeline.localize_steps = (
        options.reconstruct_steps,
        options.localize_steps,
    )
    config.pipeline.edit_steps, config.pipeline.edit_every = options.edit_steps, options.edit_every
    config.pipeline.mask_threshold = options.mask_threshold
    config.pipeline.relevance_outlier_factor = options.outlier_factor
    config.pipeline.model.relevance_expectile = options.expectile
    editor = ScriptedEditor(options.jitter)
    given: list[Marked] = []

    def raw_maps(data: WysDataManager, _: Any, views: Sequence[int], *__: Any, **___: Any) -> Iterator[Tensor]:
        yield given[0].maps[list(views)]

    with (
        mock.patch("wys_nerfstudio.pipeline.load_editor", lambda *_: editor),
        mock.patch.object(WysDataManager, "_raw_maps", raw_maps),
    ):
        config.set_timestamp()
        config.save_config()
        torch.manual_seed(seed)
        trainer: WysTrainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        data = trainer.pipeline.datamanager
        size = editor.latent_size(*editor.editing_size(*data.view_size, None))
        for number, split in enumerate((data.train_dataset, data.eval_dataset)):
            marks = _read_marks(options.marks, split.image_filenames, data.view_size)
            given.append(Marked(marks, noisy_maps(marks, size, options, 2 * seed + number)))
        starts = _note_phases(trainer)
        trainer.train()
        ends = [*(start for _, start in starts[1:]), time.perf_counter()]
    seconds = {f"{name}, s": end - start for (name, start), end in zip(starts, ends)}
    return trainer, given[1], seconds | {"peak, GiB": resident_gib("VmHWM")}


def _read_marks(folder: Path, views: Sequence[Path], size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    return read_masks(folder, views, [path.stem for path in views], *size)


def _note_phases(trainer: WysTrainer) -> list[tuple[str, float]]:
    """Return a list to which the name and start of each phase is added, and of what follows the last step."""
    session, starts = trainer.pipeline.session, []
    enter_phase, finish = session.enter_phase, session.finish

    def noted_enter_phase(phase: Phase) -> None:
        starts.append((phase.value, time.perf_counter()))
        enter_phase(phase)

    def noted_finish(step: int) -> None:
        starts.append(("end", time.perf_counter()))
        finish(step)

    session.enter_phase, session.finish = noted_enter_phase, noted_finish
    return starts


@torch.no_grad()
def render(trainer: WysTrainer, name: str) -> Float[Tensor, "n h w c"]:
    """Render an output of the held-out views."""
    trainer.pipeline.eval()
    model, cameras = trainer.pipeline.scene_model, trainer.pipeline.datamanager.eval_dataset.cameras
    return torch.stack([model.get_outputs_for_camera(cameras[i : i + 1])[name].cpu() for i in range(len(cameras))])


def localization(maps: Float[Tensor, "n h w"], marks: Bool[Tensor, "n h w"], tau: float) -> dict[str, float]:
    """Return mean average precision and IoU of relevance against marks, over the views that show the object."""
    pairs = [(view_map, mark) for view_map, mark in zip(maps, marks) if mark.any()]
    rows = {
        "AP": [average_precision(*pair) for pair in pairs],
        "IoU": [intersection_over_union(relevance.threshold(view_map, tau), mark) for view_map, mark in pairs],
    }
    return {name: sum(values) / len(values) for name, values in rows.items()}


def color_deviation(images: Sequence[Tensor], captured: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """Return the standard deviation between images of the mean difference to the intended edit inside their masks.

    Args:
        images: Edited images (h, w, 3).
        captured: The same views as captured.
        masks: Pixels (h, w) that count; images without any are left out.
    """
    triples = [triple for triple in zip(images, captured, masks) if triple[2].any()]
    colors = [(image - recolor(before))[mask].mean(dim=0) for image, before, mask in triples]
    return float(torch.stack(colors).std(dim=0).mean())


def deviation_of_edits(trainer: WysTrainer, marks: Path) -> float:
    """Return the color deviation of the edited views, inside the marks where the edit changed them."""
    data = trainer.pipeline.datamanager
    views = sorted(data.edited_views)
    masks = _read_marks(marks, data.train_dataset.image_filenames, data.view_size)[views]
    captured, edited = data.captured_views(views), data.current_views(views)
    return color_deviation([*edited], [*captured], [*(masks & (captured != edited).any(dim=-1))])


def measure(options: Options, seed: int, base: Optional[Path]) -> tuple[dict[str, Any], Path]:
    """Train a run, and return its measurements and its captured scene. Writes a contact sheet."""
    trainer, held_out, seconds = train(options, seed, base)
    data, size = trainer.pipeline.datamanager, trainer.pipeline.datamanager.view_size
    captured, marks = (
        torch.stack([data.eval_dataset[i]["image"] for i in range(len(data.eval_dataset))]),
        held_out.marks,
    )
    maps = relevance.upsample(held_out.maps, *size, "view", options.outlier_factor)
    edited, field = render(trainer, "rgb"), render(trainer, "relevance_value")[..., 0]
    row: dict[str, Any] = {"seed": seed, "maps": localization(maps, marks, options.mask_threshold)}
    row["field and hull"] = localization(field, marks, options.mask_threshold)
    row["color deviation of edited views"] = deviation_of_edits(trainer, options.marks)
    row["color deviation of held-out renders"] = color_deviation([*edited], [*captured], [*marks])
    trainer.pipeline.scene_model.field.relevance_hull.reset()
    row["field"] = localization(render(trainer, "relevance_value")[..., 0], marks, options.mask_threshold)
    load_captured_scene(trainer.pipeline, trainer.base_dir)
    before = render(trainer, "rgb")
    for name, images in (("before", before), ("after", edited)):
        row[f"outside {name}, dB"] = _mean_psnr(images, captured, ~marks)
        row[f"inside {name}, dB"] = _mean_psnr(images, recolor(captured), marks)
    rows = [
        (path.name, [captured[i], marks[i][..., None].expand(-1, -1, 3).float(), apply_colormap(maps[i]),
                     apply_colormap(field[i]), before[i], edited[i]])
        for i, path in enumerate(data.eval_dataset.image_filenames)
    ]  # fmt: skip
    titles = ["captured", "marks", "noisy map", "field and hull", "before", "edited"]
    save_png(options.output / f"held_out_{seed}.png", contact_sheet(titles, rows), "edits of photographs")
    return row | seconds, trainer.base_dir / "wys" / CAPTURED_SCENE


def _mean_psnr(images: Tensor, targets: Tensor, where: Bool[Tensor, "n h w"]) -> float:
    values = [psnr(image, target, mask) for image, target, mask in zip(images, targets, where) if mask.any()]
    return sum(values) / len(values)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return means, and minima and maxima in parentheses, of all measurements as Markdown."""
    flat = []
    for row in rows:
        values = {
            f"{name} of {key}": v for key, part in row.items() if isinstance(part, dict) for name, v in part.items()
        }
        flat.append(values | {key: v for key, v in row.items() if not isinstance(v, dict) and key != "seed"})
    lines = ["| quantity | mean (minimum to maximum) |", "|---|---|"]
    for name in dict.fromkeys(name for values in flat for name in values):
        found = [values[name] for values in flat if name in values]
        digits = 1 if name.endswith((" dB", " s")) else 3
        mean, low, high = (f"{v:.{digits}f}" for v in (sum(found) / len(found), min(found), max(found)))
        lines.append(f"| {name} | {mean} ({low} to {high}) |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measure all seeds, write the JSON file and print the table."""
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    base: Optional[Path] = None
    for seed in options.seeds:
        row, scene = measure(options, seed, base)
        rows.append(row)
        base = base or scene
        about = {"date": date.today().isoformat(), "hardware": platform.machine(), "torch": torch.__version__}
        settings = {name: str(value) for name, value in asdict(options).items()}
        result = {**about, "options": settings, "rows": rows}
        (options.output / "photographs.json").write_text(json.dumps(result, indent=1), "utf8")
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Options))
