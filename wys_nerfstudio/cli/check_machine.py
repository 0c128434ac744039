"""What `wys check` finds without measuring: versions, the device, the method that fits it, weights and programs."""

import copy
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.utils.external import TCNN_EXISTS

from wys_nerfstudio.cli.check_table import Table
from wys_nerfstudio.editing.editor import EMBEDDED
from wys_nerfstudio.editing.loading import editor_source
from wys_nerfstudio.evaluation.lpips import alexnet_file, lpips_is_cached
from wys_nerfstudio.trainer import WysTrainerConfig

GPU_MEMORY = {"wys": 8.0, "wys-small": 6.0}
"""Free memory in GB that each method needs on a GPU."""
NOT_DOWNLOADED = "not downloaded"


def recommended_method(free_gb: Optional[float]) -> str:
    """Return the largest method that fits.

    Args:
        free_gb: Free memory of the GPU in GB; None on the CPU.
    """
    return next((name for name, needed in GPU_MEMORY.items() if free_gb is not None and free_gb >= needed), "wys-tiny")


def recommended_config(device: torch.device) -> WysTrainerConfig:
    """Return a copy of the recommended method's options, with torch encodings where tiny-cuda-nn is not installed."""
    free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else None
    config: Any = copy.deepcopy(all_methods[recommended_method(free)])
    if not TCNN_EXISTS:
        config.pipeline.model.implementation = "torch"
    return config


def versions() -> Table:
    """Return the versions of the package and of what it depends on."""
    names = ("wys-nerfstudio", "nerfstudio", "diffusers", "transformers")
    return {
        **{name: version(name) for name in names},
        "torch": str(torch.__version__),  # with the CUDA that it was built for
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "CUDA of torch": torch.version.cuda or "none: on a machine with an NVIDIA GPU, install torch with CUDA",
        "tiny-cuda-nn": "yes" if TCNN_EXISTS else "no (optional; faster on a GPU)",
    }


def device_table(device: torch.device, method: str) -> Table:
    """Return the device, its memory and the recommended method."""
    table: Table = {"device": str(device)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        table |= {"GPU": torch.cuda.get_device_name(device), "memory, GB": total / 1e9, "free memory, GB": free / 1e9}
    else:
        table |= {"cores": os.cpu_count() or 0, "threads of torch": torch.get_num_threads(), **_main_memory()}
        if not torch.cuda.is_available():
            table["GPU"] = "none: torch finds no CUDA device"
    needed = " or ".join(f"{gb:g} GB for {name}" for name, gb in GPU_MEMORY.items())
    hint = f" (for toy scenes; real scenes need a GPU with {needed})" if method not in GPU_MEMORY else ""
    return {**table, "recommended method": f"{method}{hint}"}


def _main_memory() -> Table:
    if not hasattr(os, "sysconf"):  # Windows
        return {}
    return {"memory, GB": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9}


def files(editor: str, clip: str) -> Table:
    """Return where weights and programs are found, or what to do.

    Args:
        editor: The editor's name.
        clip: Name of the CLIP model.
    """
    alexnet = str(alexnet_file()) if lpips_is_cached(None) else None
    return {
        "editor": editor,
        "editor found": editor_place(editor) or f"{NOT_DOWNLOADED}: the first edit downloads it",
        "LPIPS (AlexNet) found": alexnet or f"{NOT_DOWNLOADED}: wys and wys-small download it (233 MB)",
        "CLIP": clip,
        "CLIP found": clip_place(clip) or f"{NOT_DOWNLOADED}: the first ns-eval downloads it",
        "ffmpeg": shutil.which("ffmpeg") or "not found: ns-render needs it for videos",
        "colmap": shutil.which("colmap") or "not found: ns-process-data needs it for photographs",
    }


def editor_place(name: str) -> Optional[str]:
    """Return "embedded", the folder of an editor, or its folder in the hub's cache; None if it is not downloaded."""
    source = editor_source(name)
    if name == EMBEDDED or Path(source).is_dir():
        return EMBEDDED if name == EMBEDDED else source
    places = (_in_hub_cache(name, f"{part}/config.json", f"{part}/*.safetensors") for part in ("unet", "transformer"))
    return next(filter(None, places), None)


def clip_place(name: str) -> Optional[str]:
    """Return the same of a CLIP model."""
    return name if name == EMBEDDED or Path(name).is_dir() else _in_hub_cache(name, "config.json", "*.safetensors")


def _in_hub_cache(name: str, config: str, weights: str) -> Optional[str]:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, config)
    if not isinstance(found, str):
        return None
    folder = Path(found.removesuffix(config))
    return str(folder) if list(folder.glob(weights)) else None
