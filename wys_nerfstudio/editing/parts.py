"""Loading of the parts of a repository in diffusers format, whatever the family of the editor."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch

from wys_nerfstudio.editing.editor import EMBEDDED, Editor
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.log_filters import no_progress_bar_for_local_files
from wys_nerfstudio.utils.memory_errors import is_memory_error

INDEX = "model_index.json"
"""File that names the pipeline class of a repository."""

CHECK_SIDE = 64
"""Side in pixels of the image on which a loaded editor is tried."""


def load_network(name: str, source: str, part: str, kind: Any, **options: Any) -> Any:
    """Load a network with all of its weights.

    Args:
        name: The editor's name.
        source: Folder or hub id of its parts.
        part: Folder of the network.
        kind: Its class in diffusers or transformers.
        **options: Further arguments of `from_pretrained`.

    Raises:
        WysError: If weights are missing, left over or of another size, or the network is quantized.
    """
    config = read_json(source, f"{part}/config.json") or {}
    if config.get("quantization_config") is not None:
        raise WysError(f'The {part} of the editor "{name}" is quantized (quantization_config), which is not supported.')
    network, info = kind.from_pretrained(
        source, subfolder=part, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    modules = {child for child, _ in network.named_children()}
    faults = {
        "lacks the weights": info["missing_keys"],
        "has weights of another size than its config.json:": [key for key, *_ in info["mismatched_keys"]],
        # Weights of other models may be stored beside those of the network.
        "has weights for more layers than its config.json:": [
            key for key in info["unexpected_keys"] if key.split(".")[0] in modules
        ],
    }
    for fault, keys in faults.items():
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise WysError(f'The {part} of the editor "{name}" {fault} {min(keys)}{others}. Download it again.')
    return network


def load_text_encoder(
    name: str, source: str, part: str, kind: Any, dtype: torch.dtype, use_safetensors: Optional[bool]
) -> Any:
    """Load a text encoder of transformers; arguments as in `load_network`."""
    with no_progress_bar_for_local_files(source):
        # The config's own implementation may be one that transformers downloads as code.
        options = {"dtype": dtype, "use_safetensors": use_safetensors, "attn_implementation": "sdpa"}
        return load_network(name, source, part, kind, **options)


def check_computes(editor: Editor, source: str, network: str) -> None:
    """Edit a small gray image, so that parts that do not fit together fail before the first training step.

    Args:
        editor: The editor.
        source: Folder or hub id of its parts.
        network: Part that predicts.

    Raises:
        WysError: If the networks cannot compute, or their result is NaN or infinite.
    """
    with loading_errors(editor.name, source):
        encoding = editor.encode(torch.full((1, *editor.editing_size(CHECK_SIDE, CHECK_SIDE, CHECK_SIDE), 3), 0.5))
        latents = encoding.latents
        level = editor.noise_level(0.8, (latents.shape[2], latents.shape[3]))
        predictions = editor.predictor(encoding.condition, "", editor.branches(1.0, 1.0))(latents, level)
        results = {"vae": [latents, editor.decode(latents)], network: predictions}
        for part, values in results.items():
            if not all(bool(value.isfinite().all()) for value in values):
                raise WysError(
                    f'The {part} of the editor "{editor.name}" computes NaN or Inf: its weights are damaged, or need '
                    "--editor-dtype float32."
                )


def read_json(source: str, file: str) -> "Optional[dict[str, Any]]":
    """A JSON file of a folder or hub repository; None without one.

    Args:
        source: Folder or hub id.
        file: Path in it.

    Raises:
        ValueError: If it is not a JSON object.
    """
    path = Path(source) / file
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(source, file))
        except OSError:
            return None  # if the repository is unreachable, its parts are, too
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


@contextmanager
def loading_errors(name: str, source: str) -> Iterator[None]:
    """Turn errors of diffusers and transformers into one sentence, and silence their notes on classes and weights.

    Args:
        name: The editor's name.
        source: Folder or hub id of its parts.

    Raises:
        WysError: If something cannot be loaded.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in libraries:
        library.set_verbosity_error()
    try:
        yield
    except WysError:
        raise
    except Exception as error:  # broken configs and weights raise errors of many kinds
        if is_memory_error(error):
            raise
        first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) and first_line else type(error).__name__
        reason = ": ".join(filter(None, (kind, first_line)))
        where = "folder" if Path(source).is_dir() else "hub id"
        raise WysError(
            f'The editor "{name}" could not be loaded from its {where}: {reason}. Give --editor a local folder, or '
            f"--editor {EMBEDDED} for the small one that comes with the package."
        ) from error
    finally:
        for library, verbosity in libraries:
            library.set_verbosity(verbosity)
