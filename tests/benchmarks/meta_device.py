"""Counts operations and memory of work on torch's meta device, where tensors have shapes but no values."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import qwen

EDITING = "wys_nerfstudio.editing"
FUSED_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""A kernel that never has the whole attention matrix in memory, as on a GPU."""


@dataclass
class Cost:
    """What a piece of work takes."""

    flop: int
    """Floating-point operations."""
    peak_bytes: int
    """Memory of all tensors that exist at the same time, weights included."""


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations take or return in its context, and of those given, while they exist."""

    def __init__(self, existing: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in existing:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return  # a view
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._add(leaf)
        return result


def attention_flop(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, out_shape: object = None, **__: object
) -> int:
    """Operations of attention, given the shapes (..., tokens, width) of its inputs."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def operation_counter() -> FlopCounterMode:
    """Context that counts operations, also those of `FUSED_ATTENTION`, which torch counts from 2.15 on."""
    return FlopCounterMode(display=False, custom_mapping={FUSED_ATTENTION: attention_flop})


def count(work: Callable[[], object], networks: Sequence[torch.nn.Module]) -> Cost:
    """Run a piece of work on the meta device and count its operations and memory.

    Args:
        work: The work.
        networks: Networks whose weights are in memory with it.
    """
    weights = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    with operation_counter() as flops, MemoryCounter(weights) as memory:
        work()
    return Cost(flops.get_total_flops(), memory.peak)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention that never has its whole matrix in memory; arguments as of torch's."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    return FUSED_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def states_of_texts_with_pictures(editor: qwen.QwenEditor, pictures: list[Any], instruction: str) -> Tensor:
    """`QwenEditor._text_states` without values: of the text encoder both networks, but not the places and positions of tokens."""
    text = editor.template.format(qwen.IMAGE_IN_TEXT + instruction)
    inputs = editor.processor(text=[text] * len(pictures), images=pictures, return_tensors="pt")
    model, weight = editor.text_encoder.model, editor._weight
    pixels = inputs["pixel_values"].to(weight)
    width = model.visual.config.hidden_size // model.visual.config.num_heads
    rotations = (weight.new_empty(len(pixels), width, dtype=torch.float32),) * 2
    with mock.patch.object(model.visual.rotary_pos_emb, "forward", lambda *_: rotations):
        model.visual(pixels, grid_thw=inputs["image_grid_thw"])
    tokens = weight.new_empty(*inputs["input_ids"].shape, model.language_model.config.hidden_size)
    return model.language_model(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, editor.template_tokens :]


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Context in which maps and edits run on the meta device: what needs values of tensors there is replaced.

    That is a mask's reduction to the latents, which first asks whether the mask is full, the check of the VAE's results for
    overflow, the exchange of klein's text encoder and transformer, and Qwen's images for its text encoder. Attention is a fused
    kernel, as on a GPU; the meta device would have its whole matrix in memory.
    """
    black_picture = qwen._picture

    def latent_mask(mask: Tensor, latents: Tensor) -> Tensor:
        return relevance.latent_mask(mask, latents.shape[2], latents.shape[3])

    def apply_vae(editor: Any, part: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return part(inputs.to(editor.vae.dtype)).float()

    with ExitStack() as stack:
        for target, replacement in {
            f"{EDITING}.edit._latent_mask": latent_mask,
            f"{EDITING}.stable_diffusion.apply_vae": apply_vae,
            f"{EDITING}.flow_matching.apply_vae": apply_vae,
            f"{EDITING}.flux2.Flux2Editor._text_encoder_on_device": lambda _: nullcontext(torch.device("meta")),
            f"{EDITING}.qwen._picture": lambda image: black_picture(torch.zeros(image.shape)),
            f"{EDITING}.qwen.QwenEditor._text_states": torch.no_grad()(states_of_texts_with_pictures),
            "torch.nn.functional.scaled_dot_product_attention": fused_attention,
        }.items():
            stack.enter_context(mock.patch(target, replacement))
        yield
