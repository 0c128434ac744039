"""Lossless image input and output for edits: pixels that are not edited keep their exact 8-bit values."""

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import is_memory_error
from wys_nerfstudio.utils.visualization import SOFTWARE, PngMetadata, save_png, to_float, to_uint8

READABLE = ".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .avif .heic .heif".split()
"""Suffixes of the formats that are read."""
UNREADABLE = {
    **dict.fromkeys(".dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split(), "a camera raw file"),
    ".psd": "a Photoshop file",
    ".svg": "an SVG drawing",
    ".jxl": "a JPEG XL image",
    ".jp2": "a JPEG 2000 image",
    ".exr": "an OpenEXR image",
    ".hdr": "a Radiance image",
    ".tga": "a Targa image",
    ".ppm": "a PPM image",
}
"""Suffixes of other image formats, and what they are."""
MIN_SIDE = 16
"""Minimum side length in pixels."""
EXTRAS = ("relevance", "mask", "side_by_side")
"""Files written beside an edited image `x.png`: `x_relevance.png` and so on."""
RECORD = "wys-nerfstudio"
"""Keyword of the text chunk with the edits of an image: a JSON list of all their arguments, oldest first."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")
_MASK_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BITS_PER_SAMPLE = 258
"""Tag of TIFF files."""
_KEPT_TEXTS = ("Title", "Author", "Copyright", "Creation Time", "Source", "Disclaimer", "Comment")
"""Keywords of the PNG specification that stay true of an edited image."""


@dataclass(frozen=True)
class ImageFile:
    """Content of an image file, upright and in RGB."""

    pixels: UInt8[Tensor, "h w 3"]
    """8-bit values, not multiplied by alpha."""
    alpha: Optional[UInt8[np.ndarray, "h w"]] = None
    """Alpha channel, if the file has transparency."""
    metadata: PngMetadata = PngMetadata()
    """Color profile, resolution, author and copyright."""
    edits: tuple[Mapping[str, Any], ...] = ()
    """Records of earlier edits by this package, oldest first."""

    @property
    def rgb(self) -> Float[Tensor, "h w 3"]:
        """Pixels divided by 255."""
        return to_float(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_image(path: "str | Path") -> ImageFile:
    """Read an image file as `open_image`, rotated by its EXIF orientation and converted to RGB.

    Raises:
        WysError: As for `open_image`, or if the image is too small.
    """
    path = Path(path)
    with open_image(path) as opened:
        opened.load()  # PNG files may have text at their end
        metadata, edits = _metadata(opened), _edits(opened)
        ImageOps.exif_transpose(opened, in_place=True)
        pixels = np.array(_converted(opened))
    height, width, channels = pixels.shape
    if min(height, width) < MIN_SIDE:
        raise WysError(f'"{path}" has {width}x{height} pixels: each side of an image must have at least {MIN_SIDE}.')
    alpha = pixels[..., 3].copy() if channels == 4 else None
    rgb = np.ascontiguousarray(pixels[..., :3])
    return ImageFile(torch.from_numpy(rgb), alpha, metadata, edits)


def read_stored_image(path: Path) -> Image.Image:
    """Read an image file as `open_image`, in RGB, or in RGBA if it has transparency; its EXIF orientation is not applied.

    Raises:
        WysError: As for `open_image`.
    """
    with open_image(path) as opened:
        return _converted(opened)


def _converted(image: Image.Image) -> Image.Image:
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file with 8 bits per channel; its pixels are not decoded yet.

    HEIC files are read by Pillow's plugin pillow-heif, if it is installed.

    Args:
        path: The file.

    Raises:
        WysError: If the file is missing, damaged or animated, or has another format, bit depth or color space.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, also for names that are too long
        raise WysError(f'There is no image "{path}".')
    kind = UNREADABLE.get(path.suffix.lower())
    if kind is not None:
        raise WysError(f'"{path}" is {kind}, which is not supported: convert it to PNG.')
    try:
        with path.open("rb") as file:
            head = file.read(32)
        with Image.open(path, formats=_formats(path, head)) as opened:
            _check_kind(path, head, opened)
            yield opened
    except WysError:
        raise
    except Exception as error:  # decoders raise errors of many kinds on damaged files
        if is_memory_error(error):
            raise
        raise WysError(
            f'"{path}" ({path.stat().st_size} bytes) cannot be read as an image ({" ".join(str(error).split())}): give an '
            "undamaged PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF or HEIC file."
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image as it is stored; nerfstudio ignores EXIF orientations. Reads the file's header only."""
    with Image.open(path) as image:
        return image.size


def orientation(path: Path) -> int:
    """Return the EXIF orientation of an image file: 1 if it is stored upright, 5 to 8 if width and height are swapped."""
    with Image.open(path) as image:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def enable_heic() -> None:
    """Let Pillow read HEIC files.

    Raises:
        ImportError: If pillow-heif, Pillow's plugin for them, is not installed.
    """
    import_module("pillow_heif").register_heif_opener()


def _formats(path: Path, head: bytes) -> list[str]:
    """Return Pillow's names of the supported formats that it can read.

    Raises:
        WysError: If the file has a format that needs a plugin or a later Pillow.
    """
    Image.init()
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in (b"avif", b"avis") or (brand == b"mif1" and b"avif" in head):
        if "AVIF" not in Image.OPEN:
            raise WysError(
                f'"{path}" is an AVIF image, which the installed Pillow cannot read: update it (pip install -U pillow), or '
                "convert the image to PNG."
            )
    elif brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        try:
            enable_heic()
        except ImportError as error:
            raise WysError(
                f'"{path}" is a HEIC image: install the plugin that reads it (pip install pillow-heif), or convert the '
                "image to PNG."
            ) from error
    return [name for name in _FORMATS if name in Image.OPEN]


def _check_kind(path: Path, head: bytes, opened: Image.Image) -> None:
    """Refuse images that cannot be edited without loss."""
    # Pillow reduces 16-bit color to 8 bits without a warning; byte 24 of a PNG's header is the bit depth.
    sample_bits = getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    bits = head[24] if head.startswith(_PNG_SIGNATURE) else max(sample_bits, default=8)
    if bits > 8:
        raise WysError(
            f'"{path}" has {bits} bits per channel, but edits have 8: convert it first, for example with '
            "`magick IN.png -depth 8 OUT.png`."
        )
    # JPEG and HEIC files of phones may contain further images; the first is the photograph.
    if opened.format not in ("MPO", "HEIF") and getattr(opened, "n_frames", 1) > 1:
        raise WysError(f'"{path}" is an animation or has several pages: extract them as single images.')
    if opened.mode not in _EIGHT_BITS:
        raise WysError(
            f'"{path}" is a {opened.mode} image: convert it to RGB first, for example with '
            "`magick IN.jpg -colorspace sRGB OUT.png`."
        )


def _metadata(opened: Image.Image) -> PngMetadata:
    """Return what stays true of an edited image; location, camera and thumbnail in EXIF data are not copied."""
    profile = opened.info.get("icc_profile")
    if opened.mode in ("1", "L", "LA", "La") and profile is not None and profile[16:20] != b"RGB ":
        profile = None  # a profile of gray values does not describe RGB
    chunks = {}
    if (gamma := opened.info.get("gamma")) is not None:
        chunks[b"gAMA"] = struct.pack(">I", round(100000 * gamma))
    if (primaries := opened.info.get("chromaticity")) is not None:
        chunks[b"cHRM"] = struct.pack(">8I", *(round(100000 * value) for value in primaries))
    if (intent := opened.info.get("srgb")) is not None:
        chunks[b"sRGB"] = bytes([intent])
    exif = opened.getexif()
    signed = {"Author": exif.get(ExifTags.Base.Artist), "Copyright": exif.get(ExifTags.Base.Copyright)}
    texts = {keyword: str(text).strip("\0 ") for keyword, text in signed.items() if text}
    if opened.format == "PNG":
        texts |= {keyword: text for keyword, text in opened.info.items() if keyword in _KEPT_TEXTS}
    dpi = tuple(map(float, opened.info.get("dpi", ())))
    if exif.get(ExifTags.Base.Orientation, 1) > 4:  # rotated by a quarter turn
        dpi = dpi[::-1]
    valid = len(dpi) == 2 and all(0 < value < math.inf for value in dpi)
    return PngMetadata(profile, (dpi[0], dpi[1]) if valid else None, chunks, texts)


def _edits(opened: Image.Image) -> tuple[Mapping[str, Any], ...]:
    """Return the records of earlier edits; none if the text chunk is not one of this package."""
    try:
        records = json.loads(opened.info.get(RECORD, "[]"))
    except (ValueError, RecursionError):
        return ()
    records = [records] if isinstance(records, dict) else records  # of a single edit
    return tuple(record for record in records if isinstance(record, dict)) if isinstance(records, list) else ()


def write_image(
    path: "str | Path",
    rgb: Shaped[Tensor, "h w 3"],
    like: Optional[ImageFile] = None,
    origin: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write an edited image atomically as an 8-bit PNG.

    Args:
        path: The file.
        rgb: RGB values in [0, 1], or 8-bit values.
        like: Image whose alpha channel, metadata and records of earlier edits are copied.
        origin: Record of the edit, as returned by `provenance`.
    """
    pixels = to_uint8(rgb)
    if like is not None and like.alpha is not None:
        pixels = np.concatenate([pixels, like.alpha[..., None]], axis=-1)
    save_png(Path(path), Image.fromarray(pixels), *edited_metadata(like, origin))


def edited_metadata(like: Optional[ImageFile], origin: Optional[Mapping[str, Any]]) -> tuple[str, PngMetadata]:
    """Return the description and metadata that mark an image as edited (supplement H); arguments as in `write_image`."""
    metadata, edits = (PngMetadata(), ()) if like is None else (like.metadata, like.edits)
    description = f"edited with {SOFTWARE}"
    if origin is not None:
        description, edits = f'{description}: "{origin["instruction"]}"', (*edits, origin)
    records = {RECORD: json.dumps(edits, ensure_ascii=False)} if edits else {}
    return description, replace(metadata, texts={**metadata.texts, **records})


def provenance(instruction: str, editor: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of an edit for `write_image`.

    Args:
        instruction: Instruction of the edit.
        editor: Hub id, folder or "embedded"; folders are reduced to their name.
        settings: All other settings of the edit.
    """
    editor = Path(editor).name if os.path.isdir(editor) else editor
    return {"instruction": instruction, "editor": editor, **settings}


def read_mask(path: Path) -> Bool[Tensor, "h w"]:
    """Read the mask of an image edit.

    Raises:
        WysError: As in `load_mask`, or if the file is missing or nothing is inside.
    """
    if not path.is_file():
        raise WysError(f'There is no mask "{path}": --mask takes an image that is white in the region to edit.')
    mask = load_mask(path)
    if not mask.any():
        raise WysError(
            f'The mask "{path}" is all black: nothing would be edited. White pixels mark the region to edit.'
        )
    return mask


def load_mask(path: Path, view: Optional[Path] = None) -> Bool[Tensor, "h w"]:
    """Read a mask: True inside, which is white in an opaque image and opaque in a cut-out, whatever its colors.

    Args:
        path: An image of 8 bits per channel. It is a cut-out if it has pixels that are more transparent than opaque.
        view: Image that is read as it is stored; the mask's EXIF orientation is applied unless the image has the same one.

    Raises:
        WysError: If the file is damaged or of another kind, if its inside is ambiguous, or if it has values of 1 to 127 only, as
            masks of 0 and 1 have.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode not in _MASK_MODES or (opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1):
                raise WysError(
                    f'The mask "{path}" is not a single image of 8 bits per channel in gray or RGB: convert it, for example '
                    f"with `magick {path.name} -colorspace gray -depth 8 {path.stem}.png`."
                )
            as_stored = view is not None and orientation(path) == orientation(view)
            image = (opened if as_stored else ImageOps.exif_transpose(opened)).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WysError(f'The mask "{path}" cannot be read as an image: replace it with an undamaged file.') from error
    brightness, opacity = np.array(image.convert("L")), np.array(image)[..., 3]
    opaque = opacity > 127
    values = brightness if opaque.all() else opacity
    tones = brightness[opaque]
    if values is opacity and 0 in tones and 255 in tones and np.isin(tones, (0, 255)).mean() > 0.9:
        raise WysError(
            f'The mask "{path}" has white, black and transparent pixels: make it opaque, or fill what is inside with one '
            "color."
        )
    if 0 < values.max() <= 127:
        kind = "is a 0/1 mask" if values.max() == 1 else f"has no value above {values.max()} of 255, as class ids have"
        raise WysError(f'The mask "{path}" {kind}: what is inside must be 255; multiply a 0/1 mask by 255.')
    return torch.from_numpy(values > 127)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Replace folders by the image files in them, sorted by name, including those of formats that cannot be read.

    Args:
        paths: Image files and folders.

    Raises:
        WysError: If a path is missing or a folder contains no images.
    """
    files: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            images = sorted(file for file in path.iterdir() if file.is_file() and _is_image(file))
            if not images:
                raise WysError(
                    f'There is no image in the folder "{path}": supported are PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF and '
                    "HEIC files."
                )
            files += images
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise WysError(f'There is no image "{path}".')
    return files


def _is_image(file: Path) -> bool:
    # Hidden files include macOS's "._photo.jpg", which contains no image.
    return not file.name.startswith(".") and file.suffix.lower() in (*READABLE, *UNREADABLE)


def plan_outputs(paths: Sequence[Path], images: Sequence[Path], output: "str | Path") -> list[Path]:
    """Return the output files: `output` itself for a single file, else files in the folder `output`.

    Args:
        paths: Files and folders that the user gave.
        images: The image files in them.
        output: A .png file or a folder; with a separator at its end always a folder.

    Returns:
        One file per image.

    Raises:
        WysError: If `output` does not fit the input, or a file would be written twice.
    """
    is_folder = os.path.isdir(output) or str(output).endswith(("/", os.sep))
    output = Path(output)
    if len(paths) == 1 and os.path.isfile(paths[0]) and not is_folder:
        if output.suffix.lower() != ".png":
            raise WysError(
                f'Edited images are written as lossless PNG files: give -o "{output.stem}.png" instead of "{output.name}", '
                f'or a folder, "{output.name}/".'
            )
        outputs = [output]
    else:
        if not is_folder and (output.suffix or os.path.isfile(output)):
            raise WysError(f'Several images are written to a folder: give -o a folder instead of the file "{output}".')
        outputs = [output / f"{path.stem}.png" for path in images]
    sources: dict[str, Path] = {}
    for image, file in zip(images, outputs):
        for target in output_files(file):
            name = str(target).casefold()  # some disks do not distinguish upper and lower case
            if name in sources:
                raise WysError(
                    f'"{sources[name]}" and "{image}" would both be written to "{target}": rename one of them.'
                )
            sources[name] = image
    return outputs


def output_files(output: Path) -> list[Path]:
    """Return all files written for an edited image: itself and its EXTRAS."""
    return [output, *(extra_file(output, extra) for extra in EXTRAS)]


def extra_file(output: Path, extra: str) -> Path:
    """Return the path of one of the EXTRAS of an edited image."""
    return output.with_name(f"{output.stem}_{extra}.png")


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> list[Path]:
    """Refuse output files that are read by the same command, by whatever path or link, or that cannot be files.

    Args:
        outputs: Files that will be written.
        inputs: Existing files that the command reads.

    Returns:
        The outputs that exist and will be replaced.

    Raises:
        WysError: For the first such output.
    """
    read = {(status.st_dev, status.st_ino): path for path in inputs for status in (path.stat(),)}
    replaced = []
    for output in outputs:
        # Files are written under a temporary name first, see `atomic_write`.
        for path in (output, output.with_name(f"{output.name}.partial")):
            status = _status(path)
            if status is None:
                continue
            source = read.get((status.st_dev, status.st_ino))
            if source is not None:
                raise WysError(f'"{output}" would overwrite "{source}", which is read: give -o another path.')
            if stat.S_ISDIR(status.st_mode):
                raise WysError(f'"{path}" is a folder: give -o another path.')
            if path == output:
                replaced.append(output)
    return replaced


def _status(path: Path) -> Optional[os.stat_result]:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # too long a name, no permission
        raise WysError(f'"{path}" cannot be written ({error.strerror}): give -o another path.') from error
