"""Camera paths that nerfstudio's viewer saves."""

import json
from pathlib import Path

from nerfstudio.cameras.camera_paths import get_path_from_json
from nerfstudio.cameras.cameras import Cameras

from wys_nerfstudio.utils.cameras import rotation_fault
from wys_nerfstudio.utils.errors import WysError

REMEDY = "nerfstudio's viewer saves one to camera_paths/ in the data's folder, with Generate Command in its Render tab."


def read_camera_path(file: Path) -> Cameras:
    """Return the cameras of a camera path, in the coordinates of the scene that is trained on.

    Args:
        file: A file that nerfstudio's viewer has saved.

    Raises:
        WysError: If it is not such a file, or its cameras are not perspective ones, or it crops the scene.
    """
    try:
        content = json.loads(file.read_text("utf8"))
    except OSError as error:
        raise WysError(f'The camera path "{file}" cannot be read ({error.strerror}): {REMEDY}') from error
    except ValueError as error:
        raise WysError(f'"{file}" is not a camera path, because it is not JSON: {REMEDY}') from error
    if not isinstance(content, dict) or not content.get("camera_path"):
        raise WysError(f'"{file}" has no cameras under "camera_path": {REMEDY}')
    kind = str(content.get("camera_type", "perspective")).lower()
    if kind != "perspective":
        raise WysError(f'The cameras of "{file}" are {kind} cameras: choose Perspective in the viewer\'s Render tab.')
    if "crop" in content:
        raise WysError(f'The camera path "{file}" crops the scene: save it again without Crop Viewport.')
    try:
        cameras = get_path_from_json(content)
        valid = min(cameras.width.min(), cameras.height.min()) >= 1 and bool((cameras.fx > 0).all())
        valid &= cameras.camera_to_worlds.isfinite().all() and cameras.fx.isfinite().all()
        valid &= not any(rotation_fault(pose[:, :3]) for pose in cameras.camera_to_worlds)
    except (KeyError, TypeError, ValueError, RuntimeError):
        valid = False
    if not valid:
        raise WysError(f'The camera path "{file}" has a camera without a valid pose, "fov" or size: save it again.')
    return cameras
