"""`wys make-masks`: the masks of `--pipeline.masks-dir`, from the name of an object (the paper's ablation G)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import torch
import tyro
from jaxtyping import Bool, UInt8
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from wys_nerfstudio.cli.edit_image import check_device
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.loading import Precision
from wys_nerfstudio.relevance.text_segmenter import TextSegmenter, load_text_segmenter
from wys_nerfstudio.training.image_stack import blend
from wys_nerfstudio.utils.atomic_io import write_json
from wys_nerfstudio.utils.data_checks import training_images
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import LOCK_FILE, locked_folder
from wys_nerfstudio.utils.image_io import check_outputs, image_size, load_mask, read_stored_image
from wys_nerfstudio.utils.memory_errors import convert_memory_errors
from wys_nerfstudio.utils.view_masks import mask_names
from wys_nerfstudio.utils.visualization import contact_sheet, limited_size, overlay, save_png, to_float, write_png

REQUEST = "masks.json"
SHEET = "contact_sheet.png"
SHEET_COLUMNS = 4
SHEET_SIDE = 240
"""Largest longer side in pixels of a view in the sheet, which shows all views."""


@dataclass
class MaskOptions:
    """What the masks depend on, apart from the views and the text."""

    detector: str = "IDEA-Research/grounding-dino-base"
    """Grounding DINO, which finds the object's boxes: a hub id or a local folder."""
    segmenter: str = "facebook/sam2.1-hiera-large"
    """SAM 2, which segments the boxes: a hub id or a local folder."""
    segmenter_dtype: Precision = "auto"
    """Precision of the segmenter; auto is bfloat16 on a GPU and float32 on the CPU. The detector computes in float32."""
    box_threshold: float = 0.35
    """Boxes with a score above this are segmented, from 0 to 1; lower finds the object in more views, and other things, too."""
    pixel_threshold: float = 0.5
    """Pixels with a probability above this are inside, between 0 and 1; lower makes the masks larger."""

    def dtype_on(self, device: str) -> torch.dtype:
        """Return the precision of the segmenter on a device."""
        if self.segmenter_dtype == "auto":
            return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        return getattr(torch, self.segmenter_dtype)

    def check(self) -> None:
        """Refuse thresholds that cannot work.

        Raises:
            WysError: For the first one.
        """
        if not 0 <= self.box_threshold < 1:
            raise WysError(f"--box-threshold must be at least 0 and below 1, not {self.box_threshold}.")
        if not 0 < self.pixel_threshold < 1:
            raise WysError(f"--pixel-threshold must be between 0 and 1, not {self.pixel_threshold}.")


@dataclass
class MakeMasks:
    """Make one mask per training view from the name of an object, for ns-train wys --localization masks
    --pipeline.masks-dir DIR. contact_sheet.png shows all of them. A segmenter finds only what is there: for a region that the
    edit adds, such as a hat, use the relevance field instead. Existing masks of the same command are kept, so an interrupted
    command can be resumed. A dataparser's name follows the options, as in ns-train."""

    data: tyro.conf.Positional[Path]
    """The scene, as for ns-train --data."""
    text: tyro.conf.Positional[str]
    """The object: "the bear". Several are separated by full stops: "the bear. the bench"."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the masks: a new or empty one, or that of the command that is resumed."""
    options: Annotated[MaskOptions, tyro.conf.arg(name="")] = field(default_factory=MaskOptions)
    """Models and thresholds."""
    device: str | None = None
    """Device of both models, for example cuda:1; by default the GPU if there is one, else the CPU."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=NerfstudioDataParserConfig)
    """Format of the captured data."""

    def main(self) -> None:
        """Make the masks."""
        made = make_masks(self.data, self.text, self.output, self.options, self.dataparser, self.device)
        print(f"{made.count} masks in {self.output}; see {self.output / SHEET}.")
        if made.black:
            print(
                f"Nothing was found in {len(made.black)} views, whose masks are black: {', '.join(made.black)}. Training keeps "
                "these views as captured. If they show the object, give a lower --box-threshold and another folder."
            )


@dataclass
class MadeMasks:
    """The masks of a command."""

    count: int
    """Number of views."""
    black: list[str]
    """Names of the masks of views in which nothing was found."""


def make_masks(
    data: Path,
    text: str,
    output: Path,
    options: MaskOptions,
    dataparser: DataParserConfig,
    device: Optional[str] = None,
) -> MadeMasks:
    """Make the missing masks of the training views, with a progress bar.

    Writes `masks.json`, the masks, and `contact_sheet.png`. Black masks are written last, so that a text that is found in no
    view leaves no masks.

    Args:
        data: As in `training_images`.
        text: As in `TextSegmenter.segment`.
        output: Folder of the masks.
        options: Models and thresholds.
        dataparser: Options of the parser of `data`.
        device: Device of both models; by default the GPU if there is one, else the CPU.

    Raises:
        WysError: If an argument is invalid, or the text is found in no view.
    """
    options.check()
    if not text.strip(" ."):
        raise WysError('There is no text: name the object to segment, for example "the bear".')
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    views = training_images(data, dataparser)
    names = mask_names(views)
    files = [output / f"{name}.png" for name in names]
    check_outputs([*files, output / SHEET, output / REQUEST], views)
    with locked_folder(output, "the masks"):
        request = {"text": text, **asdict(options)}
        _check_folder(output, request)
        missing = [(view, file) for view, file in zip(views, files) if not file.exists()]
        if missing:
            elsewhere = "" if device == "cpu" else ", or --device cpu"
            smaller = (
                f"try --detector IDEA-Research/grounding-dino-tiny --segmenter facebook/sam2.1-hiera-tiny{elsewhere}."
            )
            with convert_memory_errors("while views were segmented", lambda: smaller):
                segmenter = load_text_segmenter(options.detector, options.segmenter, device, options.dtype_on(device))
                segmenter.check_text(text)
                write_json(output / REQUEST, request)
                not_found = _segment(segmenter, missing, text, options)
            if len(not_found) == len(views):
                (output / REQUEST).unlink()
                raise WysError(
                    f'"{text}" was found in none of the {len(views)} views: lower --box-threshold (now '
                    f"{options.box_threshold:g}), or use other words."
                )
            for view, file in not_found:
                _write(file, torch.zeros(image_size(view)[::-1], dtype=torch.bool), text)
        save_png(output / SHEET, _draw_sheet(views, names, files), f'masks of "{text}"')
        black = [name for name, view, file in zip(names, views, files) if not load_mask(file, view).any()]
        return MadeMasks(len(views), black)


def _check_folder(folder: Path, request: dict[str, Any]) -> None:
    """Refuse a folder that has other files than the masks of the same request."""
    if not {path.name for path in folder.iterdir()} - {LOCK_FILE, REQUEST}:
        return
    try:
        stored = json.loads((folder / REQUEST).read_bytes())
    except (OSError, ValueError) as error:
        raise WysError(
            f'"{folder}" contains files that are not of this command ({REQUEST} is missing or damaged): give -o another '
            "folder."
        ) from error
    if stored != request:
        raise WysError(
            f'"{folder}" contains masks of another text or with other settings: give -o another folder, or delete it.'
        )


def _segment(
    segmenter: TextSegmenter, todo: Sequence[tuple[Path, Path]], text: str, options: MaskOptions
) -> list[tuple[Path, Path]]:
    """Write the masks of views in which the text is found.

    Args:
        segmenter: The models.
        todo: View and mask.
        text: As in `make_masks`.
        options: As in `make_masks`.

    Returns:
        Those of the pairs in which it is not found.
    """
    not_found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=len(todo))
        for view, file in todo:
            bar.update(task, description=view.name)
            mask = segmenter.segment(_read(view), text, options.box_threshold, options.pixel_threshold)
            if mask.any():
                _write(file, mask, text)
            else:
                not_found.append((view, file))
            bar.advance(task)
    return not_found


def _draw_sheet(views: Sequence[Path], names: Sequence[str], files: Sequence[Path]) -> Image.Image:
    """Arrange all views, reduced and tinted inside their masks, in rows.

    Args:
        views: Files of the views, of one size.
        names: Name of each mask.
        files: File of each mask.
    """
    width, height = image_size(views[0])
    size = limited_size(height, width, SHEET_SIDE)
    cells = []
    for view, file in zip(views, files):
        mask = load_mask(file, view).float()
        cells.append(
            overlay(
                resize_images(to_float(_read(view))[None], *size)[0], resize_images(mask[None, ..., None], *size)[0]
            )
        )
    starts = range(0, len(cells), SHEET_COLUMNS)
    rows = [(", ".join(names[start : start + SHEET_COLUMNS]), cells[start : start + SHEET_COLUMNS]) for start in starts]
    return contact_sheet([""] * SHEET_COLUMNS, rows)


def _read(view: Path) -> UInt8[Tensor, "h w 3"]:
    """Read a view as it is edited: as stored, transparent pixels on black."""
    return blend(torch.from_numpy(np.array(read_stored_image(view))), 0.0)


def _write(file: Path, mask: Bool[Tensor, "h w"], text: str) -> None:
    write_png(file, mask.float(), f'mask of "{text}"')
