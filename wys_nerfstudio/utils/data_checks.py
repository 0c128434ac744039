"""Validation of captures before a parser of nerfstudio reads them, and what its errors mean."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.dnerf_dataparser import DNeRFDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import UnidentifiedImageError

from wys_nerfstudio.utils.cameras import ONE_PLACE, TOLERANCE, check_one_size, rotation_fault
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import enable_heic, open_image
from wys_nerfstudio.utils.memory_errors import is_memory_error

INTRINSICS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
ORIENTATIONS = ("pca", "up", "vertical", "none")
SPLITS = ("train", "val", "test")
"""Splits of nerfstudio's parsers: training reads the first two, and ns-eval, ns-render and ns-viewer the first and the last."""
ANOTHER_FORMAT = "for data in another format, append its name to the command, for example colmap"


def check_capture(data: Path, options: DataParserConfig) -> None:
    """Validate what the most used parsers read: files, frames, poses, intrinsics, split lists and images.

    Args:
        data: Folder of the scene, or its .json file.
        options: The parser's options.

    Raises:
        WysError: For the first error.
    """
    if isinstance(options, NerfstudioDataParserConfig):
        _check_nerfstudio(data, options)
    elif isinstance(options, InstantNGPDataParserConfig):
        _check_instant_ngp(data)
    elif isinstance(options, (BlenderDataParserConfig, DNeRFDataParserConfig)):
        _check_blender(data)
    elif isinstance(options, ColmapDataParserConfig):
        _check_colmap(data, options)


def check_image(path: Path, source: str, decode: bool = False) -> None:
    """Check that a file is an image that can be read.

    Args:
        path: The file.
        source: File or option that refers to it, for the error message.
        decode: Decode the image instead of reading its header only.

    Raises:
        WysError: If the file is missing, or as in `open_image`.
    """
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise WysError(f'There is no image "{path}", which is listed in {source}.')
    with open_image(path) as image:
        if decode:
            image.load()


def check_names(files: Sequence[Path]) -> None:
    """Refuse file names that cannot be written in UTF-8.

    Args:
        files: Files of the views.

    Raises:
        WysError: For the first such name.
    """
    for path in files:
        try:
            path.name.encode()
        except UnicodeEncodeError as error:
            raise WysError(f"The file name {ascii(path.name)} is not valid UTF-8: rename the file.") from error


def training_images(data: Path, options: DataParserConfig) -> list[Path]:
    """Return the files of a capture's training views, as a run with the same options of the parser finds them.

    Args:
        data: Folder of the scene, or its .json file.
        options: The parser's options; they receive `data`.

    Raises:
        WysError: If a run would refuse the capture's files, or if no view is left for training.
    """
    if not os.path.exists(data):
        raise WysError(f'There is no data at "{data}": give a folder of captured views.')
    check_capture(data, options)
    options.data = data
    with parsing(options):
        files = options.setup().get_dataparser_outputs(split="train").image_filenames
    if not files:
        raise WysError(
            f'No view of "{data}" is left for training: change its train_filenames, --eval-mode, --train-split-fraction or '
            "--eval-interval."
        )
    check_names(files)
    for file in files:
        check_image(file, "the capture")
    check_one_size(files)
    return files


@contextmanager
def parsing(options: DataParserConfig) -> Iterator[None]:
    """Context in which one of nerfstudio's parsers reads a capture for a run.

    Args:
        options: The parser's options.

    Raises:
        WysError: For any error of the parser.
    """
    with suppress(ImportError):
        enable_heic()  # parsers read the size of the first image themselves
    if hasattr(options, "load_3D_points"):
        options.load_3D_points = False  # type: ignore # only Gaussian splatting uses them
    try:
        yield
    except ZeroDivisionError as error:  # parsers divide by the extent of the camera positions
        raise WysError(ONE_PLACE) from error
    except WysError:
        raise
    except Exception as error:  # nerfstudio's parsers raise errors of many kinds on data that they cannot read
        if is_memory_error(error):
            raise
        raise parser_error(options.data, options, error) from error


def parser_error(data: Path, options: DataParserConfig, error: Exception) -> WysError:
    """Return the sentence for an error of one of nerfstudio's parsers.

    Args:
        data: What the parser was to read.
        options: The parser's options.
        error: Its error.
    """
    name = next(name for name, default in all_dataparsers.items() if type(default) is type(options))
    if isinstance(error, OSError) and error.filename is not None:
        reason = "There is no" if isinstance(error, FileNotFoundError) else f"{error.strerror}:"
        return WysError(f'{reason} "{error.filename}", which {name} reads for the data at "{data}": {ANOTHER_FORMAT}.')
    if isinstance(error, UnidentifiedImageError):
        return WysError(f'An image of the data at "{data}" is damaged or of an unknown format: {error}.')
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        for file in sorted((data if data.is_dir() else data.parent).rglob("*.json")):
            _read(file)
    if isinstance(error, KeyError):
        return WysError(f'The data at "{data}" have no {error}, which {name} reads: {ANOTHER_FORMAT}.')
    if isinstance(error, EOFError) and isinstance(options, ColmapDataParserConfig):
        return WysError(
            f'There are no downscaled images at "{data}", and no terminal where nerfstudio can ask whether to make them: give '
            f"colmap --downscale-factor 1, and {_scale_factor(2)} before colmap for smaller images."
        )
    if isinstance(error, ValueError) and getattr(options, "eval_mode", None) == "filename":
        return WysError(
            f'The name of each image at "{data}" must contain train or eval with --eval-mode filename: rename the images, or '
            "choose another mode."
        )
    first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    if isinstance(error, (AssertionError, RuntimeError)) and first_line:  # raised by the parser itself
        return WysError(f'{name} refuses the data at "{data}": {first_line}.')
    return WysError(
        f'The data at "{data}" cannot be read by {name} ({type(error).__name__}: {first_line}): check them with another method '
        "of nerfstudio, or name their format at the end of the command."
    )


def _scale_factor(downscale: int) -> str:
    return f"--pipeline.datamanager.camera-res-scale-factor {1 / downscale}"


# ------------------------------------------------------------------------------------------------------------- formats


def _check_nerfstudio(data: Path, options: NerfstudioDataParserConfig) -> None:
    file = data if data.suffix == ".json" else data / "transforms.json"
    meta, frames = _read_frames(file)
    if len(frames) == 1:
        raise WysError(f'"{file}" has a single frame: a scene is reconstructed from views of different positions.')
    model = meta.get("camera_model", "OPENCV")
    if not isinstance(model, str) or model not in CAMERA_MODEL_TO_TYPE:
        raise WysError(f'"{file}" has the unknown camera_model {model}. Supported: {", ".join(CAMERA_MODEL_TO_TYPE)}.')
    for frame in frames:
        _check_pose(file, frame)
        _check_intrinsics(file, meta, frame)
    for key in ("applied_scale", "fisheye_crop_radius"):
        _check_number(file, "the capture", key, meta.get(key, 1), positive=True)
    transform = meta.get("applied_transform", [[0] * 4] * 3)
    if not _is_matrix(transform, rows=3):
        raise WysError(f'In "{file}" the "applied_transform" is not 3 x 4 finite numbers.')
    method = meta.get("orientation_override", "none")
    if method not in ORIENTATIONS:
        raise WysError(f'In "{file}" the "orientation_override" is {method}. Supported: {", ".join(ORIENTATIONS)}.')
    for key in ("mask_path", "depth_file_path"):
        _check_all_or_none(file, frames, key)
    _check_split_lists(file, meta, frames)
    if (options.downscale_factor or 1) > 1:
        _check_downscaled(file, frames, int(options.downscale_factor or 1))
    else:
        _check_images(file, (file.parent / frame["file_path"] for frame in frames))


def _check_instant_ngp(data: Path) -> None:
    file = data if data.suffix == ".json" else data / "transforms.json"
    meta, frames = _read_frames(file)
    if not any(key in meta for key in ("fl_x", "x_fov", "camera_angle_x")):
        raise WysError(
            f'"{file}" has none of "fl_x", "x_fov" and "camera_angle_x" at its top level: use nerfstudio-data if the frames have '
            "intrinsics of their own."
        )
    for key in ("fl_x", "fl_y", "x_fov", "y_fov", "camera_angle_x", "camera_angle_y", "w", "h"):
        _check_number(file, "the capture", key, meta.get(key, 1), positive=True)
    for key in ("cx", "cy", *DISTORTION):
        _check_number(file, "the capture", key, meta.get(key, 0))
    _check_all_or_none(file, frames, "mask_path")
    candidates = [(file.parent / frame["file_path"], file.parent / f"{frame['file_path']}.png") for frame in frames]
    found = [next(filter(os.path.isfile, paths), None) for paths in candidates]  # the parser skips missing images
    if not any(found):
        raise WysError(f'None of the images that "{file}" lists exists, for example "{candidates[0][0]}".')
    _check_images(file, filter(None, found))


def _check_blender(data: Path) -> None:
    for split in SPLITS:
        file = data / f"transforms_{split}.json"
        meta, frames = _read_frames(file)
        _check_number(file, "the capture", "camera_angle_x", meta.get("camera_angle_x"), positive=True)
        _check_images(file, (data / f"{frame['file_path'].replace('./', '')}.png" for frame in frames))


def _check_colmap(data: Path, options: ColmapDataParserConfig) -> None:
    folder = data / options.colmap_path
    if not any(
        all(os.path.isfile(folder / f"{part}{end}") for part in ("cameras", "images")) for end in (".bin", ".txt")
    ):
        raise WysError(
            f'There is no COLMAP model in "{folder}": give colmap --colmap-path the folder of cameras.bin and images.bin, for '
            "example sparse/0."
        )
    if (options.downscale_factor or 1) == 1 and not os.path.isdir(data / options.images_path):
        raise WysError(
            f'There is no folder "{data / options.images_path}": give colmap --images-path that of the images.'
        )
    lists = {name: data / f"{name}_list.txt" for name in (*SPLITS, "validation")}
    missing = [lists[split] for split in SPLITS if not lists[split].exists()]
    if missing and any(path.exists() for path in lists.values()):
        raise WysError(
            f'There is no "{missing[0]}": the split needs train_list.txt, val_list.txt and test_list.txt, of which the last two '
            "can be equal."
        )


# --------------------------------------------------------------------------------------------------------------- parts


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text("utf8")
        if text.startswith("\ufeff"):
            raise WysError(
                f'"{file}" begins with a byte order mark, which nerfstudio cannot read: save it as UTF-8 without one.'
            )
        meta = json.loads(text)
    except OSError as error:
        raise WysError(f'"{file}" cannot be read: {error.strerror}.') from error
    except (ValueError, RecursionError) as error:
        raise WysError(f'"{file}" is not valid JSON: {str(error).splitlines()[0]}.') from error
    if not isinstance(meta, dict):
        raise WysError(f'"{file}" is not a capture: it has no "frames".')
    return meta


def _read_frames(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a JSON file with frames, each of which has a file and a pose."""
    if not os.path.isfile(file):
        hint = "ns-process-data writes it; " if file.name == "transforms.json" else ""
        raise WysError(f'There is no "{file}": {hint}{ANOTHER_FORMAT}.')
    meta = _read(file)
    frames = meta.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise WysError(f'"{file}" has no list of "frames": create it again with ns-process-data.')
    for number, frame in enumerate(frames):
        name = frame.get("file_path")
        if not isinstance(name, str) or not name or "\0" in name:
            raise WysError(f'In "{file}" frame {number} has no "file_path".')
        if not _is_matrix(frame.get("transform_matrix")):
            raise WysError(f'In "{file}" the "transform_matrix" of {name} is not 4 x 4 finite numbers.')
    return meta, frames


def _check_images(file: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        check_image(path, f'"{file}"')


def _check_downscaled(file: Path, frames: Sequence[Mapping[str, Any]], factor: int) -> None:
    """Check that there are downscaled images and masks, which nerfstudio finds by their names without folders."""
    for key, kind in (("file_path", "images"), ("mask_path", "masks")):
        sources: dict[Path, str] = {}
        for frame in frames:
            if key not in frame:
                continue
            path = file.parent / f"{kind}_{factor}" / Path(frame[key]).name
            if not os.path.isfile(path):
                raise WysError(
                    f'There is no "{path}": --downscale-factor {factor} reads smaller {kind} that ns-process-data has made; '
                    f"without them give {_scale_factor(factor)} instead, before the name of the format."
                )
            other = sources.setdefault(path, frame[key])
            if other != frame[key]:
                raise WysError(
                    f'With --downscale-factor {factor} nerfstudio reads "{path}" for both {other} and {frame[key]}: give '
                    f"{_scale_factor(factor)} instead, before the name of the format."
                )
            if kind == "images":
                check_image(path, f'"{file}"')


def _check_all_or_none(file: Path, frames: Sequence[Mapping[str, Any]], key: str) -> None:
    without = [frame["file_path"] for frame in frames if key not in frame]
    if without and len(without) < len(frames):
        raise WysError(
            f'In "{file}" {len(without)} of {len(frames)} frames have no "{key}", the first of them {without[0]}: give it to '
            "all frames or to none."
        )
    for frame in frames:
        if key in frame and not isinstance(frame[key], str):
            raise WysError(f'In "{file}" the "{key}" of {frame["file_path"]} is not a path.')


def _check_split_lists(file: Path, meta: Mapping[str, Any], frames: Sequence[Mapping[str, Any]]) -> None:
    keys = [f"{split}_filenames" for split in SPLITS]
    given = [key for key in keys if key in meta]
    files = {Path(frame["file_path"]) for frame in frames}
    for key in keys if given else ():
        if key not in given:
            raise WysError(
                f'"{file}" has {" and ".join(given)}, but no {key}: training reads the first two splits, ns-eval and ns-render '
                "train and test; val_filenames and test_filenames can be equal."
            )
        names = meta[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise WysError(f'In "{file}" {key} is not a list of file names.')
        unknown = [name for name in names if Path(name) not in files]
        if unknown:
            raise WysError(f'In "{file}" {key} lists {unknown[0]}, which is not the "file_path" of any frame.')


def _check_pose(file: Path, frame: Mapping[str, Any]) -> None:
    pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    fault = rotation_fault(pose[:3, :3])
    if fault is None and (pose[3] - pose.new_tensor([0, 0, 0, 1])).abs().max() > TOLERANCE:
        fault = f"without a last row of 0 0 0 1 (it is {' '.join(f'{value:g}' for value in pose[3].tolist())})"
    if fault is not None:
        raise WysError(
            f'In "{file}" the "transform_matrix" of {frame["file_path"]} is {fault}: it must be a rotation and a translation; '
            "create the file again with ns-process-data."
        )


def _check_intrinsics(file: Path, meta: Mapping[str, Any], frame: Mapping[str, Any]) -> None:
    name = frame["file_path"]
    for key in INTRINSICS:
        value = meta.get(key, frame.get(key))
        if value is None:
            raise WysError(f'In "{file}" neither the top level nor the frame of {name} has "{key}".')
        _check_number(file, name, key, value, positive=key not in ("cx", "cy"))
    for key in DISTORTION:
        _check_number(file, name, key, meta.get(key, frame.get(key, 0)))


def _check_number(file: Path, name: str, key: str, value: Any, positive: bool = False) -> None:
    if value is None:
        raise WysError(f'In "{file}" there is no "{key}".')
    if not _is_number(value) or (positive and value <= 0):
        raise WysError(f'In "{file}" the "{key}" of {name} has the invalid value {json.dumps(value)[:40]}.')


def _is_number(value: Any) -> bool:
    # Larger numbers would overflow in float32 arithmetic.
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)
    )


def _is_matrix(matrix: Any, rows: int = 4) -> bool:
    is_list = isinstance(matrix, list) and len(matrix) == rows and all(isinstance(row, list) for row in matrix)
    return is_list and all(len(row) == 4 and all(map(_is_number, row)) for row in matrix)
