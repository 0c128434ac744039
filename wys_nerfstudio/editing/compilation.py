"""Compilation of an editor's network with torch.compile, for the edits of a scene, whose views have one size."""

import torch

from wys_nerfstudio.editing.editor import Editor
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import is_memory_error


def check_compiler(device: "str | torch.device") -> None:
    """Compile a small function: without a compiler, torch.compile fails only in the first edit.

    Args:
        device: Device of the editor.

    Raises:
        WysError: If torch cannot compile for the device.
    """
    try:
        torch.compile(_probe)(torch.zeros(2, device=device))
    except Exception as error:  # torch raises errors of many kinds for missing and failing compilers
        if is_memory_error(error):
            raise
        compiler = "triton and a C compiler" if torch.device(device).type == "cuda" else "a C++ compiler such as g++"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WysError(
            f"The editor cannot be compiled on this machine ({reason}): install {compiler}, or leave out "
            "--pipeline.compile-editor."
        ) from error


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.exp() + 1


def compile_editor(editor: Editor, cuda_graphs: bool) -> None:
    """Compile the network of an editor's predictions in place. Its weights keep their names.

    Every number of rows (views times guidance branches) is compiled in its first call. Up to torch's recompile_limit of
    eight; for further ones torch logs a warning, and they are computed without compilation. Relevance maps are not compiled
    (`Editor.full_precision`), and neither is the VAE, which gains 5 % and would need as long as the network to compile.

    Args:
        editor: The editor.
        cuda_graphs: Whether calls on a GPU are replayed as CUDA graphs; only for calls from the main thread, because torch
            before 2.14 raises in other threads.
    """
    mode = "reduce-overhead" if cuda_graphs and editor.device.type == "cuda" else None
    # With dynamic shapes the kernels would depend on the shapes of earlier calls, and edits of a resumed run would differ.
    editor.network.compile(dynamic=False, mode=mode)
