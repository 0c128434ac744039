"""Cameras of a run as frames of nerfstudio's transforms.json, in the coordinates of the capture."""

import json
from dataclasses import dataclass
from typing import Any, Optional

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import (
    DataParserConfig,
    DataparserOutputs,
    transform_poses_to_original_space,
)
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from torch import Tensor

from wys_nerfstudio.utils.data_checks import DISTORTION

COLMAP_FOLDER = "colmap/sparse/0"
COLMAP_TRANSFORM = [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]]
"""nerfstudio's applied_transform of captures that have the folder and do not state one."""
MODELS = {CameraType.PERSPECTIVE.value: "OPENCV"} | {
    kind.value: name for name, kind in CAMERA_MODEL_TO_TYPE.items() if kind != CameraType.PERSPECTIVE
}
"""`camera_model` by camera type."""


@dataclass(frozen=True)
class CaptureFrame:
    """Coordinates of a capture: those of its transforms.json, and for other formats those that the dataparser's transform starts
    from, such as COLMAP's."""

    transform: Float[Tensor, "3 4"]
    """Transform from the capture to the scene that is trained on, without its scale; float64."""
    scale: float
    """Scale from the capture to the scene."""
    applied_transform: Optional[list[list[Any]]] = None
    """The capture's own `applied_transform`, which led to its transforms.json."""

    @staticmethod
    def of(options: DataParserConfig, outputs: DataparserOutputs) -> "CaptureFrame":
        """Return the coordinates of a capture.

        Args:
            options: Options of the parser that has read it.
            outputs: Result of the parser.
        """
        transform, scale, applied = outputs.dataparser_transform.double(), outputs.dataparser_scale, None
        if isinstance(options, NerfstudioDataParserConfig):
            file = options.data if options.data.suffix == ".json" else options.data / "transforms.json"
            meta = json.loads(file.read_text("utf8"))
            implied = COLMAP_TRANSFORM if (options.data / COLMAP_FOLDER).exists() else None
            applied = meta.get("applied_transform", implied)
            scale /= meta.get("applied_scale", 1.0)
        if applied is not None:
            transform = transform @ torch.linalg.inv(_square(torch.tensor(applied).double()))
        return CaptureFrame(transform, scale, applied)

    def poses(self, camera_to_worlds: Float[Tensor, "b 3 4"]) -> Float[Tensor, "b 3 4"]:
        """Return poses of cameras in the capture's coordinates, in float64."""
        poses = camera_to_worlds.detach().cpu().double()
        return transform_poses_to_original_space(poses, self.transform, self.scale, "opengl")

    def points(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Return positions in the capture's coordinates, in float64."""
        inverse = torch.linalg.inv(_square(self.transform))
        return positions.detach().cpu().double() / self.scale @ inverse[:3, :3].T + inverse[:3, 3]


def _square(transform: Float[Tensor, "3 4"]) -> Float[Tensor, "4 4"]:
    return torch.cat([transform, transform.new_tensor([[0, 0, 0, 1]])])


def camera_keys(camera: Cameras, frame: CaptureFrame) -> dict[str, Any]:
    """Return pose, intrinsics and distortion of a camera under the keys of a frame.

    Args:
        camera: A single camera, in the coordinates of the scene.
        frame: Coordinates of the capture.
    """
    keys: dict[str, Any] = {"transform_matrix": _square(frame.poses(camera.camera_to_worlds)[0]).tolist()}
    for key, name in (("fl_x", "fx"), ("fl_y", "fy"), ("cx", "cx"), ("cy", "cy"), ("w", "width"), ("h", "height")):
        keys[key] = getattr(camera, name)[0].item()
    if camera.distortion_params is not None:
        values = camera.distortion_params[0].tolist()
        keys |= dict(zip(DISTORTION, values)) if len(values) == len(DISTORTION) else {"distortion_params": values}
    return keys


def capture_keys(cameras: Cameras, frame: CaptureFrame) -> dict[str, Any]:
    """Return what all frames of a capture share: the camera model and, where they apply, the radius of fisheye images and the
    `applied_transform`.

    Args:
        cameras: All cameras.
        frame: Coordinates of the capture.
    """
    keys: dict[str, Any] = {"camera_model": MODELS[int(cameras.camera_type[0])]}
    if "fisheye_crop_radius" in (cameras.metadata or {}):
        keys["fisheye_crop_radius"] = cameras.metadata["fisheye_crop_radius"]  # type: ignore
    if frame.applied_transform is not None:
        keys["applied_transform"] = frame.applied_transform
    return keys
