"""`wys edit-image`: edits image files and writes each result with its relevance map, its mask and a comparison."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Optional

import torch
import tyro
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wys_nerfstudio.editing import EditSettings, ImageEditOutput, edit_image, load_editor
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.loading import Precision, resolve_dtype
from wys_nerfstudio.utils.devices import check_device_type
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import (
    ImageFile,
    extra_file,
    find_images,
    plan_outputs,
    provenance,
    read_image,
    read_mask,
    write_image,
)
from wys_nerfstudio.utils.memory_errors import convert_memory_errors, is_memory_error
from wys_nerfstudio.utils.visualization import apply_colormap, contact_sheet, save_png, write_png

_SHEET_LONG_SIDE = 512


@dataclass
class EditImage:
    """Edit the region of images that an instruction refers to. Besides the edited image OUT.png, writes OUT_relevance.png,
    OUT_mask.png and OUT_side_by_side.png. Pixels outside the mask keep their exact values."""

    # One positional list: a separate list of files would also consume the instruction.
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='IN... "INSTRUCTION"')]
    """Images (PNG, JPEG, WebP) or folders of images, followed by the instruction: "turn the bear into a panda"."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """A .png file for a single image, a folder for several."""
    editor: str = "timbrooks/instruct-pix2pix"
    """InstructPix2Pix-type checkpoint: a hub id, a local folder in diffusers format, or "embedded" for the small editor of
    toy images that is part of the package."""
    editor_dtype: Precision = "auto"
    """Precision of the editor's weights and edits; auto is float16 on a GPU and float32 on the CPU. Relevance maps are
    computed in float32."""
    editor_allow_pickle: bool = False
    """Load .bin files of an editor without safetensors files, with torch's weights-only loader."""
    mask: Path | None = None
    """Mask image of the input's size, white in the region to edit; replaces the mask computed from the relevance map."""
    seed: int = 0
    """Seed of the noise; equal seeds give equal edits."""
    device: str | None = None
    """Device of the editor, for example cuda:1; by default the GPU if there is one, else the CPU."""
    settings: Annotated[EditSettings, tyro.conf.arg(name="")] = field(default_factory=EditSettings)
    """Settings of the edits."""

    def main(self) -> None:
        """Edit the images."""
        if len(self.arguments) < 2:
            raise WysError(
                'wys edit-image takes images and an instruction: wys edit-image IN.png "turn the bear into a panda" '
                "-o OUT.png."
            )
        *inputs, instruction = self.arguments
        outputs = edit_files(
            [Path(path) for path in inputs],
            instruction,
            self.output,
            self.settings,
            editor_name=self.editor,
            editor_dtype=self.editor_dtype,
            allow_pickle=self.editor_allow_pickle,
            mask_file=self.mask,
            seed=self.seed,
            device=self.device,
        )
        print(f"Wrote {', '.join(str(file) for file in outputs)}; the comparison is in *_side_by_side.png.")


def edit_files(
    paths: Sequence[Path],
    instruction: str,
    output: Path,
    settings: EditSettings,
    *,
    editor_name: str,
    editor_dtype: Precision = "auto",
    allow_pickle: bool = False,
    mask_file: Optional[Path] = None,
    seed: int = 0,
    device: Optional[str] = None,
) -> list[Path]:
    """Edit image files with a progress bar; all arguments are validated before the editor is loaded.

    Args:
        paths: Image files and folders of image files.
        instruction: What to change.
        output: A .png file for a single image, else a folder.
        settings: How to edit.
        editor_name: As in `load_editor`.
        editor_dtype: As `dtype` in `load_editor`.
        allow_pickle: As in `load_editor`.
        mask_file: A mask for all images, instead of their relevance masks.
        seed: Seed of the noise, the same for every image, so that its edit does not depend on the other images.
        device: Device of the editor; by default the GPU if there is one, else the CPU.

    Returns:
        The edited files.

    Raises:
        WysError: If an argument is invalid.
    """
    settings.check()
    if not instruction.strip():
        raise WysError('There is no instruction: describe what to change, for example "turn the bear into a panda".')
    # Path.exists raises for a text that is too long for a file name.
    if os.path.exists(instruction):
        raise WysError(
            f'The last argument, "{instruction}", is a file, not an instruction: put the instruction after the images.'
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    files = find_images(paths)
    mask = None if mask_file is None else read_mask(mask_file)
    for path in files:
        height, width = read_image(path).size
        if mask is not None and mask.shape != (height, width):
            raise WysError(
                f'The mask "{mask_file}" has {mask.shape[1]}x{mask.shape[0]} pixels, but "{path}" has {width}x{height}: give '
                "a mask of the image's size."
            )
    outputs = plan_outputs(paths, files, output)
    make_folder(outputs[0].parent)

    used_settings = {
        "editor_dtype": resolve_dtype(editor_dtype, device),
        **asdict(settings),
        "seed": seed,
        "mask": None if mask_file is None else mask_file.name,
    }
    origin = provenance(instruction, editor_name, used_settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with convert_editor_memory_errors(device), Progress(*columns, TimeRemainingColumn()) as bar:
        editor = load_editor(editor_name, device, editor_dtype, allow_pickle)
        steps = settings.relevance_num_samples + settings.diffusion_steps
        task = bar.add_task("", total=len(files) * steps)
        for i, (path, target) in enumerate(zip(files, outputs)):
            bar.update(task, description=f"{path.name} ({i + 1} of {len(files)})")
            image = read_image(path)
            edit = edit_image(
                editor,
                image.rgb,
                instruction,
                settings,
                mask=mask,
                seed=seed,
                on_progress=lambda done, _: bar.update(task, completed=i * steps + done),
            )
            _write(target, path.name, image, edit, instruction, origin)
            bar.update(task, completed=(i + 1) * steps)
            if not edit.mask.any():
                bar.print(
                    f"{path.name}: no pixel reaches the mask threshold, so nothing was edited. Lower --mask-threshold.",
                    markup=False,
                    highlight=False,
                )
    return outputs


def check_device(device: str) -> None:
    """Check that a device is supported and available.

    Raises:
        WysError: If it is not.
    """
    check_device_type(device, "--device")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_memory_error(error):
            raise
        raise WysError(f'The device "{device}" is not available: --device takes cpu, cuda or cuda:1.') from error


def convert_editor_memory_errors(device: str) -> AbstractContextManager[None]:
    """Convert errors of memory that ran out while images are edited.

    Args:
        device: Device of the editor.
    """
    elsewhere = "" if device == "cpu" else ", or --device cpu"
    return convert_memory_errors(
        "while images were edited", lambda: f"try a lower --resolution, such as --resolution 256{elsewhere}."
    )


def make_folder(folder: Path) -> None:
    """Create a folder for results.

    Raises:
        WysError: If it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WysError(
            f'The folder "{folder}" cannot be created ({error.strerror}): give -o another folder.'
        ) from error
    if not os.access(folder, os.W_OK):
        raise WysError(f'The folder "{folder}" cannot be written to: give -o another folder.')


def _write(
    file: Path, name: str, image: ImageFile, edit: ImageEditOutput, instruction: str, origin: dict[str, str]
) -> None:
    write_image(file, edit.edited, like=image, origin=origin)
    write_png(extra_file(file, "relevance"), edit.relevance)
    write_png(extra_file(file, "mask"), edit.mask.float())
    save_png(extra_file(file, "side_by_side"), side_by_side(image, edit, f"{name}: {instruction}"), texts=origin)


def side_by_side(image: ImageFile, edit: ImageEditOutput, name: str) -> Image.Image:
    """Arrange input, relevance map, mask and edited image side by side; large images are reduced."""
    cells = torch.stack(
        [image.rgb, apply_colormap(edit.relevance), edit.mask[..., None].expand(-1, -1, 3).float(), edit.edited]
    )
    height, width = image.size
    scale = min(1.0, _SHEET_LONG_SIDE / max(height, width))
    cells = resize_images(cells, max(1, round(height * scale)), max(1, round(width * scale)))
    titles = ["captured", "relevance", "mask", "edited"]
    return contact_sheet(titles, [(name, list(cells))], min_height=160 if scale == 1 else 1)
