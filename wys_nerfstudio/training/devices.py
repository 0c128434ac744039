"""Which devices a run has: chosen, and refused where they are not there, before anything starts."""

from typing import Optional

import torch
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.model import WysModelConfig
from wys_nerfstudio.utils.errors import WysError


def choose_device(method: Optional[str], machine: MachineConfig, model: WysModelConfig) -> None:
    """Takes the CPU where there is no CUDA, torch's encodings where there is no tiny-cuda-nn, and says so."""
    if machine.device_type == "cuda" and not torch.cuda.is_available():
        machine.device_type = "cpu"
        hint = " Try ns-train wys-tiny for a size that suits it." if method == "wys" else ""
        CONSOLE.print(f"No CUDA device was found: running on the CPU.{hint}")
    if model.implementation == "tcnn":
        from nerfstudio.utils.external import TCNN_EXISTS

        if not TCNN_EXISTS:
            model.implementation = "torch"
            CONSOLE.print("tiny-cuda-nn is not installed: nerfstudio's torch encodings are used, which are slower.")


def same_device(first: "str | torch.device", second: "str | torch.device") -> bool:
    """Whether two names mean one device; "cuda" is "cuda:0"."""
    one, other = torch.device(first), torch.device(second)
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def check_devices(machine: MachineConfig, edit_count: int, edit_every: int) -> None:
    """Refuses devices that are not there, and says when some of them will edit nothing.

    Args:
        machine: nerfstudio's options of the machine.
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
            f"--machine.num-devices is {devices}, and this machine has {found} CUDA devices; without CUDA leave it out."
        )
    if devices > edit_count:
        CONSOLE.print(
            f"Only {edit_count} of {devices} devices will edit at a time: --pipeline.edit-count {devices} with "
            f"--pipeline.edit-every {devices * edit_every} gives each of them a view."
        )
