"""Types of devices that the package supports."""

from wys_nerfstudio.utils.errors import WysError

DEVICE_TYPES = ("cpu", "cuda")
"""Not Apple's mps: antialiased resizing and adaptive pooling are incomplete there, and nothing was ever run on it."""


def check_device_type(device: str, option: str) -> None:
    """Refuse devices of other types.

    Args:
        device: Name of the device, such as cuda:1.
        option: The option that it was given to.

    Raises:
        WysError: If the type is not in `DEVICE_TYPES`.
    """
    if device.split(":", maxsplit=1)[0] not in DEVICE_TYPES:
        raise WysError(f'The device "{device}" is not supported: {option} takes {" or ".join(DEVICE_TYPES)}.')
