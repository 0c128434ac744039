"""Choice and validation of the devices of a run."""

from typing import Optional

import torch
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.utils.devices import check_device_type
from wys_nerfstudio.utils.errors import WysError


def choose_device(method: Optional[str], machine: MachineConfig) -> None:
    """Replace CUDA by the CPU where there is no CUDA device, and say so.

    Args:
        method: Name of the method.
        machine: nerfstudio's options of the machine; changed in place.

    Raises:
        WysError: If the device's type is not supported.
    """
    check_device_type(machine.device_type, "--machine.device-type")
    if machine.device_type == "cuda" and not torch.cuda.is_available():
        machine.device_type = "cpu"
        hint = " Try ns-train wys-tiny, which has a suitable size." if method == "wys" else ""
        CONSOLE.print(f"No CUDA device was found: running on the CPU.{hint}")


def choose_implementation(implementation: str) -> str:
    """Return the backend of encodings and networks: "torch" instead of "tcnn" where tiny-cuda-nn is not installed."""
    if implementation != "tcnn":
        return implementation
    from nerfstudio.utils.external import TCNN_EXISTS

    if TCNN_EXISTS:
        return implementation
    CONSOLE.print("tiny-cuda-nn is not installed: nerfstudio's torch encodings are used, which are slower.")
    return "torch"


def has_own_device(editor: Optional[str], training: "str | torch.device", processes: int) -> bool:
    """Return whether the editor has a device that no process trains on; the same on all processes.

    Args:
        editor: Device of the editor; None is the training device of each process.
        training: Training device of this process. Rank i trains on cuda:i.
        processes: Number of processes.
    """
    if editor is None:
        return False
    device = torch.device(editor)
    return device.type != torch.device(training).type or (device.index or 0) >= processes


def validate_editor_device(device: Optional[str]) -> None:
    """Refuse an editor device that does not exist or is not supported.

    Raises:
        WysError: If it does not, or is not.
    """
    if device is None:
        return
    check_device_type(device, "--pipeline.editor-device")
    count = torch.cuda.device_count()
    try:
        parsed = torch.device(device)
        exists = parsed.type == "cpu" or (parsed.index or 0) < count
    except RuntimeError:
        exists = False
    if not exists:
        raise WysError(
            f'There is no device "{device}": --pipeline.editor-device can be cpu, or cuda:0 and so on where there is a GPU '
            f"({count} here)."
        )


def validate_machine(machine: MachineConfig, editor_device: Optional[str], edit_count: int, edit_every: int) -> None:
    """Refuse devices that do not exist, and report devices that will edit nothing.

    Args:
        machine: nerfstudio's options of the machine.
        editor_device: Device of the editor, which exists; None is the training device.
        edit_count: Views per edit step.
        edit_every: Steps from one edit step to the next.

    Raises:
        WysError: If the run cannot have these devices.
    """
    devices, found = machine.num_devices, torch.cuda.device_count()
    if machine.num_machines != 1:
        raise WysError("A scene is trained on one machine: leave out --machine.num-machines.")
    if devices < 1 or 1 < devices and (devices > found or machine.device_type != "cuda"):
        raise WysError(
            f"--machine.num-devices is {devices}, but this machine has {found} CUDA devices; without CUDA leave it out."
        )
    if devices > 1 and editor_device is not None and not has_own_device(editor_device, machine.device_type, devices):
        raise WysError(
            f"--pipeline.editor-device {editor_device} is one of the {devices} training devices: leave it out, so that each of "
            f"them edits views, or name a device from cuda:{devices} on."
        )
    if devices > edit_count:
        CONSOLE.print(
            f"Only {edit_count} of {devices} devices will edit at a time: --pipeline.edit-count {devices} with "
            f"--pipeline.edit-every {devices * edit_every} gives each of them a view."
        )
