"""`wys sweep`: edits over a grid of mask thresholds and image guidance scales, evaluated with CLIP.

Reproduces Fig. 6, 12 and 13 of the paper, which compare masks with image guidance at equal strength of the edit. Edits are made
with `edit_image`; the metrics are those of InstructPix2Pix.
"""

from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Optional, TypeVar

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wys_nerfstudio.cli.edit_image import check_device, convert_editor_memory_errors
from wys_nerfstudio.cli.sweep_plots import draw_curves, draw_grid
from wys_nerfstudio.cli.sweep_table import (
    REQUEST,
    TABLE,
    SweepCase,
    SweepResult,
    edit_file,
    finished_rows,
    grid_file,
    read_cases,
    sweep_request,
    write_table,
)
from wys_nerfstudio.editing import EditOptions, Editor, EditSettings, edit_image, load_editor
from wys_nerfstudio.editing.edit import check_supported
from wys_nerfstudio.editing.loading import Precision, editor_files, load_profile, resolve_dtype
from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.evaluation.clip import ClipEncoder, load_clip
from wys_nerfstudio.utils.atomic_io import write_text
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import locked_folder
from wys_nerfstudio.utils.image_io import check_outputs, provenance, read_image, write_image

CURVES = "curves.png"

T = TypeVar("T")
Hidden = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]
"""A setting without a flag."""


@dataclass(frozen=True)
class SweepOptions(EditOptions):
    """Options of the edits, and the grid of the two that are varied. The grid's defaults are those of the paper's Fig. 12."""

    mask_thresholds: tuple[float, ...] = (0.0, 0.3, 0.4, 0.5, 0.6)
    """Values of tau, one curve each; 0 edits the whole image."""
    image_guidance_scales: tuple[float, ...] = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    """Values of S_I, the points of each curve."""
    mask_threshold: Hidden[float] = EditOptions.mask_threshold
    """Varied by the grid."""
    image_guidance_scale: Hidden[Optional[float]] = None
    """Varied by the grid."""
    method: Hidden[Literal["local", "sds"]] = "local"
    """Image guidance does not apply to SDS."""

    def check_grid(self) -> None:
        """Validate the grid and the settings of its edits.

        Raises:
            WysError: For the first invalid setting.
        """
        for name, values in (
            ("mask-thresholds", self.mask_thresholds),
            ("image-guidance-scales", self.image_guidance_scales),
        ):
            # As in file names, which have six digits.
            if not values or len({f"{value:g}" for value in values}) < len(values):
                raise WysError(f"--{name} takes one or more different numbers, for example --{name} 0.5 1.0.")
        for threshold in self.mask_thresholds:
            self.edit(threshold, self.image_guidance_scales[0]).check()

    def edit(self, mask_threshold: float, image_guidance_scale: float) -> EditOptions:
        """Return the options of one edit of the grid."""
        values = {option.name: getattr(self, option.name) for option in fields(EditOptions)}
        varied = {"mask_threshold": mask_threshold, "image_guidance_scale": image_guidance_scale}
        return EditOptions(**{**values, **varied})


@dataclass
class Sweep:
    """Edit a list of images over a grid of mask thresholds and image guidance scales, evaluate the edits with CLIP, and
    plot the trade-off (the paper's Fig. 6, 12 and 13). An interrupted sweep can be resumed by the same command."""

    edits: tyro.conf.Positional[Path]
    """A .csv, .yaml or .json list with image (relative to the list), instruction, caption_before and caption_after."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of sweep.csv, curves.png, grids/ and edits/."""
    editor: str = "timbrooks/instruct-pix2pix"
    """InstructPix2Pix, FLUX.2 klein or Qwen-Image-Edit: a hub id, a local folder in diffusers format, or "embedded"."""
    editor_dtype: Precision = "auto"
    """Precision of the editor's weights and edits; auto is float16 (FLUX.2 and Qwen: bfloat16) on a GPU and float32 on the
    CPU. Relevance maps are computed in float32."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP model: a hub id, a local folder, or "embedded" for the model of the toy world."""
    seed: int = 0
    """Seed of the noise."""
    device: str | None = None
    """Device of editor and CLIP, for example cuda:1; by default the GPU if there is one, else the CPU."""
    settings: Annotated[SweepOptions, tyro.conf.arg(name="")] = field(default_factory=SweepOptions)
    """The grid, and the settings of the edits."""

    def main(self) -> None:
        """Run the sweep."""
        rows = run_sweep(
            self.edits,
            self.output,
            self.settings,
            editor_name=self.editor,
            editor_dtype=self.editor_dtype,
            clip_name=self.clip,
            seed=self.seed,
            device=self.device,
        )
        print(f"{len(rows)} edits; see {self.output}/sweep.csv, {self.output}/curves.png and {self.output}/grids/.")


def run_sweep(
    list_file: Path,
    output: Path,
    settings: SweepOptions,
    *,
    editor_name: str,
    editor_dtype: Precision = "auto",
    clip_name: str,
    seed: int = 0,
    device: Optional[str] = None,
) -> list[SweepResult]:
    """Compute the missing edits of a sweep, with a progress bar.

    Writes `sweep.json`, once everything is checked, `edits/`, `sweep.csv`, `curves.png` and `grids/`. An edit is finished
    once its image is written and its row is in the table; an interrupted sweep resumes from there.

    Args:
        list_file: As in `read_cases`.
        output: Folder of the results.
        settings: Grid, and settings of the edits.
        editor_name: As in `load_editor`.
        editor_dtype: As `dtype` in `load_editor`.
        clip_name: As in `load_clip`.
        seed: Seed of the noise, the same for every edit, so that edits differ in their settings only.
        device: Device of editor and CLIP; by default the GPU if there is one, else the CPU.

    Returns:
        All results, case by case.

    Raises:
        WysError: If an argument is invalid; captions and instructions are checked before the first edit.
    """
    settings.check_grid()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    cases = read_cases(list_file)
    grid = list(product(range(len(cases)), settings.mask_thresholds, settings.image_guidance_scales))
    profile = load_profile(editor_name)
    for scale in settings.image_guidance_scales:
        profile.check_guidance(editor_name, settings.guidance_scale, scale)
    edits = {key: settings.edit(*key[1:]).resolve(profile.of_images) for key in grid}
    dtype = resolve_dtype(editor_dtype, device, profile)
    request = {
        **asdict(settings),
        **{name: getattr(edits[grid[0]], name) for name in asdict(profile.of_images) if name != "image_guidance_scale"},
        **{"editor": editor_name, "editor_dtype": dtype, "clip": clip_name, "seed": seed},
    }
    outputs = [TABLE, REQUEST, CURVES, *(edit_file(*key) for key in grid), *map(grid_file, range(len(cases)))]
    read = [list_file, *(case.image for case in cases), *editor_files(editor_name)]
    check_outputs([output / file for file in outputs], read)
    with locked_folder(output, "the sweep"):
        content = sweep_request(cases, request)
        rows = {row.key: row for row in finished_rows(output, content)}

        todo = [key for key in grid if key not in rows]
        if todo:
            with convert_editor_memory_errors(device):
                clip = load_clip(clip_name, device)
                for case in cases:
                    clip.embed_texts([case.caption_before, case.caption_after])
                editor = load_editor(editor_name, device, editor_dtype)
                check_supported(editor, [case.instruction for case in cases], edits[grid[0]])
                write_text(output / REQUEST, content)
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
                with Progress(*columns, TimeRemainingColumn()) as bar:
                    task = bar.add_task("", total=len(todo))
                    for key in todo:
                        number, threshold, scale = key
                        case = cases[number]
                        bar.update(task, description=f"{case.image.name}, tau {threshold:g}, S_I {scale:g}")
                        row = _edit(number, case, edits[key], editor, dtype, clip, output, seed)
                        rows[row.key] = row
                        write_table(output, [rows[key] for key in grid if key in rows])
                        bar.advance(task)
        done = [rows[key] for key in grid]
        draw_curves(done, output / CURVES)
        for number, case in enumerate(cases):
            draw_grid(case, [row for row in done if row.case == number], output, output / grid_file(number))
        return done


def _edit(
    number: int,
    case: SweepCase,
    settings: EditSettings,
    editor: Editor,
    dtype: str,
    clip: ClipEncoder,
    output: Path,
    seed: int,
) -> SweepResult:
    image = read_image(case.image)
    edited = edit_image(editor, image.rgb, case.instruction, settings, seed=seed).edited
    name = edit_file(number, settings.mask_threshold, settings.image_guidance_scale)
    origin = provenance(case.instruction, editor.name, {"editor_dtype": dtype, **asdict(settings), "seed": seed})
    write_image(output / name, edited, like=image, origin=origin)
    before, after = clip.embed_images(torch.stack([image.rgb, edited])).split(1)
    text_before, text_after = clip.embed_texts([case.caption_before, case.caption_after])
    return SweepResult(
        case=number,
        image=case.image.name,
        instruction=case.instruction,
        mask_threshold=settings.mask_threshold,
        image_guidance_scale=settings.image_guidance_scale,
        direction_similarity=metrics.direction_similarity(before, after, text_before, text_after).item(),
        image_similarity=metrics.image_similarity(before, after).item(),
        text_image_similarity=metrics.text_image_similarity(after, text_after).item(),
        file=name,
    )
