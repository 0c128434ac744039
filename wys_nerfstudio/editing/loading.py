"""From a hub id or a folder to an `Editor`: finds the family of a repository and loads its parts."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Optional

import torch

from wys_nerfstudio.editing import flux2, qwen, sdxl, stable_diffusion
from wys_nerfstudio.editing.editor import EMBEDDED, Editor, EditorProfile
from wys_nerfstudio.editing.parts import INDEX, loading_errors, read_json
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.hub import local_if_offline

FAMILIES: dict[str, ModuleType] = {
    "StableDiffusionInstructPix2PixPipeline": stable_diffusion,
    "StableDiffusionXLInstructPix2PixPipeline": sdxl,
    "Flux2KleinPipeline": flux2,
    "QwenImageEditPlusPipeline": qwen,
}
"""Module of each family by the pipeline class of its model_index.json, with PARTS, NETWORKS, `profile` and `load`."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""Names of an editor's precision; see `load_editor`."""


def load_editor(
    name: str, device: "str | torch.device" = "cpu", dtype: Precision = "auto", allow_pickle: bool = False
) -> Editor:
    """Load an editor; the first call imports diffusers and transformers.

    Args:
        name: Hub id or local folder of an InstructPix2Pix-type checkpoint, or "embedded".
        device: Device of the networks.
        dtype: Precision of their weights; "auto" is the half precision that they were trained for on a GPU and float32 on
            the CPU. Relevance maps are computed in float32 with any of them.
        allow_pickle: Take .bin files where there is no safetensors file; torch's weights-only loader reads them.

    Raises:
        WysError: If the editor cannot be loaded or is not supported.
    """
    source = local_if_offline(editor_source(name), "editor")
    family, index = _family_of(name, source)
    if Path(source).is_dir():
        _check_parts(name, Path(source), family.PARTS)
        if not allow_pickle:
            _refuse_pickles(name, Path(source), family.NETWORKS)
    resolved: torch.dtype = getattr(torch, resolve_dtype(dtype, device, family.profile(index)))
    return family.load(name, source, device, resolved, None if allow_pickle else True)


def load_profile(name: str) -> EditorProfile:
    """Defaults and guidance of an editor; reads its model_index.json only.

    Raises:
        WysError: If the editor is not found or not supported.
    """
    family, index = _family_of(name, local_if_offline(editor_source(name), "editor"))
    return family.profile(index)


def editor_source(name: str) -> str:
    """The folder of an editor, or its hub id.

    Raises:
        WysError: If the name is neither a folder nor a possible hub id.
    """
    folder = Path(__file__).parent.parent / "demo" / "editor" if name == EMBEDDED else Path(os.path.expanduser(name))
    if folder.is_dir():
        return str(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WysError(
            f'There is no editor folder "{name}": give --editor a folder in diffusers format, a hub id such as '
            f'timbrooks/instruct-pix2pix, or "{EMBEDDED}".'
        )
    return name


def editor_files(name: str) -> list[Path]:
    """The files of a local editor; none of a hub id.

    Raises:
        WysError: As in `editor_source`.
    """
    folder = Path(editor_source(name))
    return [file for file in (*folder.glob("*"), *folder.glob("*/*")) if file.is_file()]


def _family_of(name: str, source: str) -> "tuple[ModuleType, dict[str, Any]]":
    """The module that loads an editor, and its model_index.json; Stable Diffusion if there is none."""
    with loading_errors(name, source):
        index = read_json(source, INDEX)
    if index is None:
        return stable_diffusion, {}
    pipeline: Optional[str] = index.get("_class_name")
    if pipeline not in FAMILIES:
        raise WysError(
            f'The editor "{name}" is a {pipeline or "pipeline without a class name"}, which is not supported. Supported: '
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[pipeline], index


def _check_parts(name: str, folder: Path, parts: "tuple[str, ...]") -> None:
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise WysError(
            f'The editor folder "{name}" has no {" and no ".join(missing)}: --editor needs a checkpoint in diffusers format, '
            f"with the folders {', '.join(parts)}."
        )


def _refuse_pickles(name: str, folder: Path, networks: "tuple[str, ...]") -> None:
    for part in networks:
        files = [path.suffix for path in (folder / part).glob("*")]
        if ".bin" in files and ".safetensors" not in files:
            raise WysError(
                f'The editor "{name}" has its {part} as a pickle (.bin) only: give one with safetensors files, or '
                "--pipeline.editor-allow-pickle True (wys edit-image: --editor-allow-pickle), which reads it with torch's "
                "weights-only loader."
            )


def resolve_dtype(dtype: Precision, device: "str | torch.device", profile: EditorProfile) -> str:
    """Name of the torch dtype of an editor on a device: what "auto" stands for, anything else unchanged."""
    if dtype != "auto":
        return dtype
    return profile.half_precision if torch.device(device).type == "cuda" else "float32"
