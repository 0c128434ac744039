"""`wys edit-image`: edits image files and writes each result with its relevance map, its mask and a comparison."""

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import tyro
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wys_nerfstudio.editing import EditOptions, ImageEditOutput, edit_image, load_editor
from wys_nerfstudio.editing.edit import check_supported
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.loading import Precision, editor_files, load_profile, resolve_dtype
from wys_nerfstudio.utils.devices import check_device_type
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import (
    ImageFile,
    check_outputs,
    edited_metadata,
    extra_file,
    find_images,
    output_files,
    plan_outputs,
    provenance,
    read_image,
    read_mask,
    write_image,
)
from wys_nerfstudio.utils.memory_errors import convert_memory_errors, is_memory_error
from wys_nerfstudio.utils.visualization import PngMetadata, apply_colormap, contact_sheet, save_png, to_float, write_png

_SHEET_LONG_SIDE = 512


@dataclass
class EditImage:
    """Edit the region of images that an instruction refers to. Besides the edited image OUT.png, writes OUT_relevance.png,
    OUT_mask.png and OUT_side_by_side.png; existing ones are replaced. Pixels outside the mask keep their exact values. For
    OUT_side_by_side.png the whole image is edited, too, without the mask: half of the denoising steps."""

    # One positional list: a separate list of files would also consume the instruction.
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='IN... "INSTRUCTION"')]
    """Images (PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF, and HEIC with pillow-heif) or folders of images, followed by the
    instruction: "turn the bear into a panda"."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="PATH")]
    """A .png file for a single image, a folder for several; FOLDER/ for a single image in a folder."""
    editor: str = "timbrooks/instruct-pix2pix"
    """InstructPix2Pix, FLUX.2 klein or Qwen-Image-Edit: a hub id, a local folder in diffusers format, or "embedded" or
    "embedded-flow", the small editors of toy images that come with the package."""
    editor_dtype: Precision = "auto"
    """Precision of the editor's weights and edits; auto is float16 (FLUX.2 and Qwen: bfloat16) on a GPU and float32 on the
    CPU. Relevance maps are computed in float32."""
    editor_allow_pickle: bool = False
    """Load .bin files of an editor without safetensors files, with torch's weights-only loader."""
    mask: Path | None = None
    """Mask image of the input's size, white in the region to edit; replaces the mask computed from the relevance map."""
    seed: int = 0
    """Seed of the noise; equal seeds give equal edits."""
    device: str | None = None
    """Device of the editor, for example cuda:1; by default the GPU if there is one, else the CPU."""
    settings: Annotated[EditOptions, tyro.conf.arg(name="")] = field(default_factory=EditOptions)
    """Options of the edits."""

    def main(self) -> None:
        """Edit the images."""
        if len(self.arguments) < 2:
            raise WysError(
                'wys edit-image takes images and an instruction: wys edit-image IN.png "turn the bear into a panda" '
                "-o OUT.png."
            )
        *inputs, instruction = self.arguments
        result = edit_files(
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
        if result.written:
            print(f"Wrote {_names(result.written)}; the comparison is in *_side_by_side.png.")
        if result.replaced:
            print(f"Replaced {_names(result.replaced)}.")
        if result.failed:
            count = len(result.written) + len(result.failed)
            raise WysError(f"{len(result.failed)} of {count} images could not be edited: {_names(result.failed)}.")


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


@dataclass
class EditedFiles:
    """What became of image files."""

    written: list[Path] = field(default_factory=list)
    """The edited files, without those beside them."""
    replaced: list[Path] = field(default_factory=list)
    """Written files that existed before, those beside the edited files included."""
    failed: list[Path] = field(default_factory=list)
    """Images that could not be edited."""

    def report_failure(self, path: Path, error: WysError) -> None:
        """Print why an image of several cannot be edited, and go on."""
        self.failed.append(path)
        print(f"wys: {error}", file=sys.stderr)


def edit_files(
    paths: Sequence[Path],
    instruction: str,
    output: "str | Path",
    options: EditOptions,
    *,
    editor_name: str,
    editor_dtype: Precision = "auto",
    allow_pickle: bool = False,
    mask_file: Optional[Path] = None,
    seed: int = 0,
    device: Optional[str] = None,
) -> EditedFiles:
    """Edit image files with a progress bar; all arguments are validated before the editor is loaded.

    Args:
        paths: Image files and folders of image files.
        instruction: What to change.
        output: As in `plan_outputs`.
        options: How to edit.
        editor_name: As in `load_editor`.
        editor_dtype: As `dtype` in `load_editor`.
        allow_pickle: As in `load_editor`.
        mask_file: A mask for all images, instead of their relevance masks.
        seed: Seed of the noise, the same for every image, so that its edit does not depend on the other images.
        device: Device of the editor; by default the GPU if there is one, else the CPU.

    Returns:
        The files. Of several images, those that cannot be edited are reported, and the others are edited.

    Raises:
        WysError: If an argument is invalid, or a single image cannot be edited.
    """
    options.check()
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
    result, images = EditedFiles(), []
    for path in files:
        try:
            _read(path, mask, mask_file)
            images.append(path)
        except WysError as error:
            if len(files) == 1:
                raise
            result.report_failure(path, error)
    outputs = plan_outputs(paths, images, output)
    masks = [] if mask_file is None else [mask_file]
    targets = [target for file in outputs for target in output_files(file)]
    existing = set(check_outputs(targets, [*files, *masks, *editor_files(editor_name)]))
    if images:
        make_folder(outputs[0].parent)
    else:
        return result

    profile = load_profile(editor_name)
    settings = options.resolve(profile.of_images)
    profile.check_guidance(editor_name, settings.guidance_scale, settings.image_guidance_scale)
    used_settings = {
        "editor_dtype": resolve_dtype(editor_dtype, device, profile),
        **asdict(settings),
        "seed": seed,
        "mask": None if mask_file is None else mask_file.name,
    }
    origin = provenance(instruction, editor_name, used_settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with convert_editor_memory_errors(device), Progress(*columns, TimeRemainingColumn()) as bar:
        editor = load_editor(editor_name, device, editor_dtype, allow_pickle)
        check_supported(editor, [instruction], settings)
        steps = settings.relevance_num_samples + 2 * settings.diffusion_steps
        task = bar.add_task("", total=len(images) * steps)
        for i, (path, target) in enumerate(zip(images, outputs)):
            bar.update(task, description=f"{path.name} ({i + 1} of {len(images)})")
            try:
                image = _read(path, mask, mask_file)
                edit = edit_image(
                    editor,
                    image.pixels,
                    instruction,
                    settings,
                    mask=mask,
                    seed=seed,
                    with_unmasked=True,
                    on_progress=lambda done, _: bar.update(task, completed=i * steps + done),
                )
                _write(target, path.name, image, edit, instruction, origin)
            except WysError as error:
                if len(files) == 1:
                    raise
                result.report_failure(path, error)
                continue
            finally:
                bar.update(task, completed=(i + 1) * steps)
            result.written.append(target)
            result.replaced += [file for file in output_files(target) if file in existing]
            if not edit.mask.any():
                bar.print(
                    f"{path.name}: no pixel reaches the mask threshold, so nothing was edited. Lower --mask-threshold.",
                    markup=False,
                    highlight=False,
                )
    return result


def _read(path: Path, mask: Optional[torch.Tensor], mask_file: Optional[Path]) -> ImageFile:
    """Read an image, and refuse one that does not have the mask's size."""
    image = read_image(path)
    height, width = image.size
    if mask is not None and mask.shape != (height, width):
        raise WysError(
            f'The mask "{mask_file}" has {mask.shape[1]}x{mask.shape[0]} pixels, but "{path}" has {width}x{height}: give a '
            "mask of the image's size."
        )
    return image


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
    file: Path, name: str, image: ImageFile, edit: ImageEditOutput, instruction: str, origin: dict[str, Any]
) -> None:
    about = f'of the edit "{instruction}"'
    try:
        write_image(file, edit.edited, like=image, origin=origin)
        write_png(extra_file(file, "relevance"), edit.relevance, f"relevance map {about}")
        write_png(extra_file(file, "mask"), edit.mask.float(), f"mask {about}")
        sheet = side_by_side(image, edit, f"{name}: {instruction}")
        description, metadata = edited_metadata(image, origin)
        save_png(extra_file(file, "side_by_side"), sheet, description, PngMetadata(texts=metadata.texts))
    except OSError as error:
        raise WysError(f'"{file}" could not be written ({error.strerror}): give -o another path.') from error


def side_by_side(image: ImageFile, edit: ImageEditOutput, name: str) -> Image.Image:
    """Arrange input, relevance map, mask, the edit without the mask and the edited image side by side (the paper's Fig. 14);
    large images are reduced."""
    height, width = image.size
    scale = min(1.0, _SHEET_LONG_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))

    def reduced(cell: torch.Tensor) -> torch.Tensor:
        return resize_images(to_float(cell)[None], *size)[0]

    cells = {
        "captured": reduced(image.pixels),
        "relevance": apply_colormap(reduced(edit.relevance[..., None])[..., 0]),
        "mask": reduced(edit.mask[..., None].float()).expand(-1, -1, 3),
        "without mask": None if edit.unmasked is None else reduced(edit.unmasked),
        "edited": reduced(edit.edited),
    }
    shown = {title: cell for title, cell in cells.items() if cell is not None}
    return contact_sheet(list(shown), [(name, list(shown.values()))], min_height=160 if scale == 1 else 1)
