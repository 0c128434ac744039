"""From a hub id or a folder to an `Editor`: five parts of an InstructPix2Pix repository, safetensors only.

The safety checker (1.2 GB in the original) and the feature extractor are never touched.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

import torch

from wys_nerfstudio.editing.editor import Editor
from wys_nerfstudio.editing.sdxl import as_sdxl_editor
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.log_filters import no_progress_bar_for_local_files

EMBEDDED = "embedded"
"""Name of the small editor of toy pictures that comes with the package."""

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

FAMILIES: dict[Optional[str], Callable[[Editor, str, Optional[bool]], Editor]] = {
    None: lambda editor, source, use_safetensors: editor,
    "text_time": as_sdxl_editor,
}
"""By what a UNet wants beside its text (diffusers' `addition_embed_type`): the rest of a family's loading."""

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def editor_source(name: str) -> str:
    """Where the parts of an editor are: its folder, or the hub id itself.

    Raises:
        WysError: If the name is a folder that lacks a part, or neither a folder nor a possible hub id.
    """
    folder = Path(__file__).parent.parent / "demo" / "editor" if name == EMBEDDED else Path(name).expanduser()
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise WysError(
                f'There is no editor folder "{name}": give --editor a folder in diffusers format, a hub id such as '
                f'timbrooks/instruct-pix2pix, or "{EMBEDDED}".'
            )
        return name
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise WysError(
            f'The editor folder "{name}" has no {" and no ".join(missing)}: --editor needs an InstructPix2Pix checkpoint '
            f"in diffusers format, with the folders {', '.join(PARTS)}."
        )
    return str(folder)


def load_editor(
    name: str, device: "str | torch.device" = "cpu", dtype: Precision = "auto", allow_pickle: bool = False
) -> Editor:
    """Loads an editor; the first call imports diffusers and transformers.

    Args:
        name: Hub id or local folder of an InstructPix2Pix-type checkpoint, or "embedded".
        device: Where the networks go.
        dtype: Their precision; "auto" is bfloat16 on a GPU that has it, float16 on another, float32 on the CPU.
        allow_pickle: Take .bin files where there is no safetensors file; torch's weights-only loader reads them.

    Raises:
        WysError: If it can't be had, or is no InstructPix2Pix.
    """
    source = editor_source(name)
    if not allow_pickle:
        _refuse_pickles(name, Path(source))

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers import CLIPTextModel, CLIPTokenizer

    use_safetensors = None if allow_pickle else True
    weights = {"torch_dtype": resolve_dtype(dtype, device), "use_safetensors": use_safetensors}
    verbosity = diffusers_logging.get_verbosity()
    # A scheduler of another class, as InstructPix2Pix's own repository names, is read for its betas only.
    diffusers_logging.set_verbosity_error()
    try:
        unet: Any = UNet2DConditionModel.from_pretrained(source, subfolder="unet", **weights)
        vae: Any = AutoencoderKL.from_pretrained(source, subfolder="vae", **weights)
        text_weights: dict[str, Any] = {"dtype": weights["torch_dtype"], "use_safetensors": use_safetensors}
        with no_progress_bar_for_local_files(source):
            text_encoder: Any = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **text_weights)
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        scheduler: Any = DDIMScheduler.from_pretrained(source, subfolder="scheduler")
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = "folder" if Path(source).is_dir() else "hub id (is there a network?)"
        raise WysError(
            f'The editor "{name}" could not be loaded from its {where}: {first_line}. Give --editor a local folder, or '
            f"--editor {EMBEDDED} for the small one that comes with the package."
        ) from error
    finally:
        diffusers_logging.set_verbosity(verbosity)

    channels, wanted = unet.config.in_channels, 2 * vae.config.latent_channels
    if channels != wanted:
        raise WysError(
            f'The editor "{name}" is no InstructPix2Pix checkpoint: its UNet takes {channels} input channels, not {wanted}. '
            "Give --editor one that was trained on instructions, such as timbrooks/instruct-pix2pix."
        )
    # transformers makes a tokenizer of an empty folder, too: one without words and without a limit.
    text = text_encoder.config
    if tokenizer.model_max_length > text.max_position_embeddings or len(tokenizer) < text.vocab_size:
        raise WysError(
            f'The editor "{name}" has no whole tokenizer: {len(tokenizer)} tokens, and its text encoder knows '
            f"{text.vocab_size}. Download it again."
        )
    if unet.config.addition_embed_type not in FAMILIES:
        raise WysError(
            f'The editor "{name}" wants conditions of a kind that is not known here ({unet.config.addition_embed_type}): give '
            "--editor an InstructPix2Pix of Stable Diffusion or SDXL."
        )
    prediction_type = scheduler.config["prediction_type"]
    if prediction_type not in ("epsilon", "v_prediction"):
        raise WysError(
            f'The editor "{name}" predicts "{prediction_type}"; --editor takes one that predicts epsilon or v_prediction.'
        )
    for network in (unet, vae, text_encoder):
        network.to(device).eval().requires_grad_(False)
    editor = Editor(
        name=name,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        alphas_cumprod=scheduler.alphas_cumprod.float().to(device),
        final_alpha=scheduler.final_alpha_cumprod.float().to(device),
        prediction_type=prediction_type,
    )
    return FAMILIES[unet.config.addition_embed_type](editor, source, use_safetensors)


def _refuse_pickles(name: str, source: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        files = [path.suffix for path in (source / part).glob("*")]
        if ".bin" in files and ".safetensors" not in files:
            raise WysError(
                f'The editor "{name}" has its {part} as a pickle (.bin) only: give one with safetensors files, or '
                "--pipeline.editor-allow-pickle True (wys edit-image: --editor-allow-pickle), which reads it with torch's "
                "weights-only loader."
            )


def resolve_dtype(dtype: Precision, device: "str | torch.device") -> torch.dtype:
    """The torch dtype of a precision's name."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
