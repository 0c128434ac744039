"""Precision of an editor's networks: float32 arithmetic for relevance maps, and for images that overflow in half precision."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class HasVae(Protocol):
    """An editor with an autoencoder."""

    name: str
    """The editor's name, for the log."""
    vae: Any
    """diffusers' autoencoder."""
    overflow_reported: bool
    """Whether its overflow in half precision has been logged."""


def apply_vae(editor: HasVae, part: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Encode or decode in the VAE's precision; images that overflow there are computed again in float32.

    Only these, so that the images of a batch do not influence each other.

    Args:
        editor: The editor.
        part: Encoder or decoder of its VAE.
        inputs: Images or latents, one per row.

    Returns:
        Float32 latents or images.
    """
    dtype = editor.vae.dtype
    outputs = part(inputs.to(dtype)).float()
    if dtype == torch.float32:
        return outputs
    overflowed = ~outputs.flatten(1).isfinite().all(dim=1)
    if overflowed.any():
        if not editor.overflow_reported:
            editor.overflow_reported = True
            precision = str(dtype).removeprefix("torch.")
            logging.getLogger(__name__).warning(
                f'The VAE of the editor "{editor.name}" overflows in {precision}: images with NaN or Inf are computed again '
                "in float32."
            )
        with in_float32(editor.vae):
            outputs[overflowed] = part(inputs[overflowed])
    return outputs


@contextmanager
def in_float32(*networks: Any) -> Iterator[None]:
    """Context in which networks are cast to float32 in place; half-precision weights return unchanged."""
    dtypes = [network.dtype for network in networks]
    try:
        for network in networks:
            _cast(network, torch.float32)
        yield
    finally:
        for network, dtype in zip(networks, dtypes):
            _cast(network, dtype)


@contextmanager
def in_float32_by_layer(network: torch.nn.Module) -> Iterator[None]:
    """Context in which each layer computes with its weights cast to float32, and only while it computes.

    Layers take float32 inputs in it. At most one layer's weights exist in both precisions.
    """
    originals: dict[tuple[torch.nn.Module, str], torch.nn.Parameter] = {}

    def widen(layer: torch.nn.Module, _inputs: Any) -> None:
        for name, weight in list(layer.named_parameters(recurse=False)):
            if weight.dtype != torch.float32:
                originals[layer, name] = weight
                setattr(layer, name, torch.nn.Parameter(weight.float(), requires_grad=False))

    def restore(layer: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
        for name, _ in list(layer.named_parameters(recurse=False)):
            if (layer, name) in originals:
                setattr(layer, name, originals.pop((layer, name)))

    hooks = []
    for layer in network.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            hooks += [
                layer.register_forward_pre_hook(widen),
                layer.register_forward_hook(restore, always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cast(network: Any, dtype: torch.dtype) -> None:
    # diffusers' own `to` warns about every cast.
    torch.nn.Module.to(network, dtype)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context without TF32, which has the mantissa of float16; torch takes it for float32 convolutions by default.

    It applies to all threads: not to be entered while the scene is trained.
    """
    matmul_precision, convolutions_in_tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions_in_tf32
        torch.set_float32_matmul_precision(matmul_precision)
