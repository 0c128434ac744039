"""An editor of FLUX.2 whose steps compute some of the tokens only, with keys and values of the others from an earlier step.

In each attention layer the tokens of a pass attend to each other. Where most of them have hardly changed since an earlier pass, their
keys and values of that pass stand in for them, and nothing else of them is needed. The package does not do this: see the figures.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.editing.editor import Branch, NoiseLevel, Predictor
from wys_nerfstudio.editing.flow_matching import pack, unpack
from wys_nerfstudio.editing.flux2 import Flux2Editor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values (b, tokens, heads, width), after the rotary embedding, to the attention's result."""


@dataclass
class KeyValueCache:
    """Keys and values of all tokens (text, noisy, reference), by attention layer of a Flux2Transformer2DModel."""

    _stored: "dict[int, tuple[Tensor, Tensor]]" = field(default_factory=dict, init=False, repr=False)

    @contextmanager
    def filled_by(self, transformer: Any) -> Iterator[None]:
        """Context in which a pass over all tokens fills the cache."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Cloned: the values are a view of a projection that is several times as large.
            self._stored[layer] = key, value.clone()
            return _attention(query, key, value)

        with _replaced_attention(transformer, attend):
            yield

    @contextmanager
    def completing(self, transformer: Any, rows: slice, tokens: Int[Tensor, " kept"]) -> Iterator[None]:
        """Context in which a pass over some of the tokens attends to the others in the cache, too.

        Args:
            transformer: The transformer.
            rows: Rows of the earlier pass that are those of this one.
            tokens: Numbers of the tokens, of the earlier pass, that are not in this one.
        """

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = (cached[rows][:, tokens] for cached in self._stored[layer])
            return _attention(query, torch.cat([key, keys], dim=1), torch.cat([value, values], dim=1))

        with _replaced_attention(transformer, attend):
            yield


@dataclass(frozen=True)
class RegionEditor:
    """An editor that computes the whole image in some steps of a denoising run only, and a region in the others."""

    editor: Flux2Editor
    """The editor."""
    region: Bool[Tensor, "b h w"]
    """Latents where predictions are needed; in the steps in between they are zero elsewhere."""
    full_pass_every: int
    """Steps from one that computes the whole image to the next, counted from the first step."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.editor, name)

    def predictor(self, condition: Float[Tensor, "b c h w"], instruction: str, branches: Sequence[Branch]) -> Predictor:
        """Bind the conditions of a batch of images for one denoising run; arguments as in `Editor`.

        A step computes the noisy tokens in and next to the region. The other tokens have the keys and values of the last
        step that computed all. Image by image, because regions differ in size.
        """
        editor, count, (height, width) = self.editor, len(branches), condition.shape[2:]
        predict_all = editor.predictor(condition, instruction, branches)
        text = editor._text_rows(instruction, branches, 1)
        image_ids, text_ids = editor._positions(condition, text)
        inside = relevance.dilate(self.region).flatten(1)
        # Tokens are numbered as in a pass: text, noisy, reference.
        cached = torch.ones(len(inside), len(text_ids) + len(image_ids), dtype=torch.bool, device=inside.device)
        cached[:, len(text_ids) : len(text_ids) + height * width] = ~inside
        tokens = [(torch.nonzero(x)[:, 0], torch.nonzero(y)[:, 0]) for x, y in zip(inside, cached)]
        cache, steps = KeyValueCache(), itertools.count()

        @torch.no_grad()
        def predict(latents: Tensor, level: NoiseLevel) -> Sequence[Tensor]:
            if next(steps) % self.full_pass_every == 0:
                with cache.filled_by(editor.transformer):
                    return predict_all(latents, level)
            noisy = pack(latents)
            result = noisy.new_zeros(count, *noisy.shape)
            for i, (computed, others) in enumerate(tokens):
                with cache.completing(editor.transformer, slice(i, None, len(noisy)), others):
                    result[:, i, computed] = editor.transformer(
                        hidden_states=noisy[i, computed].expand(count, -1, -1).to(editor._dtype),
                        encoder_hidden_states=text[:, :0].to(editor._dtype),
                        timestep=torch.full((count,), level.time, device=editor.device),
                        img_ids=image_ids[computed],
                        txt_ids=text_ids[:0],
                        return_dict=False,
                    )[0].float()
            return [unpack(velocity, height, width) for velocity in result]

        return predict


def _attention(
    query: Float[Tensor, "b q heads width"],
    key: Float[Tensor, "b k heads width"],
    value: Float[Tensor, "b k heads width"],
) -> Float[Tensor, "b q heads width"]:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(query, key, value)


@contextmanager
def _replaced_attention(transformer: Any, attend: "Callable[[int, Tensor, Tensor, Tensor], Tensor]") -> Iterator[None]:
    """Context in which all layers of a transformer attend by a function of layer, queries, keys and values."""
    double = [block.attn for block in transformer.transformer_blocks]
    single = [block.attn for block in transformer.single_transformer_blocks]
    before = [layer.processor for layer in (*double, *single)]

    def bound(number: int) -> Attend:
        return lambda query, key, value: attend(number, query, key, value)

    for number, layer in enumerate((*double, *single)):
        layer.set_processor((_DoubleStream if number < len(double) else _SingleStream)(bound(number)))
    try:
        yield
    finally:
        for layer, processor in zip((*double, *single), before):
            layer.set_processor(processor)


@dataclass
class _DoubleStream:
    """Attention processor of a layer with separate weights for text and image."""

    attend: Attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        text = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        image = [attn.to_q, attn.to_k, attn.to_v]
        text_query, text_key, text_value = (_heads(attn, project(encoder_hidden_states)) for project in text)
        query, key, value = (_heads(attn, project(hidden_states)) for project in image)
        query = torch.cat([attn.norm_added_q(text_query), attn.norm_q(query)], dim=1)
        key = torch.cat([attn.norm_added_k(text_key), attn.norm_k(key)], dim=1)
        value = torch.cat([text_value, value], dim=1)
        result = self.attend(*_rotated(image_rotary_emb, query, key), value).flatten(2)
        tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](result[:, tokens:]), attn.to_add_out(result[:, :tokens])


@dataclass
class _SingleStream:
    """Attention processor of a layer with common weights, whose feedforward part runs beside the attention."""

    attend: Attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        projected = attn.to_qkv_mlp_proj(hidden_states)
        width = attn.inner_dim
        query, key, value, feedforward = projected.split([width] * 3 + [projected.shape[-1] - 3 * width], dim=-1)
        query, key, value = (_heads(attn, part) for part in (query, key, value))
        result = self.attend(*_rotated(image_rotary_emb, attn.norm_q(query), attn.norm_k(key)), value).flatten(2)
        return attn.to_out(torch.cat([result, attn.mlp_act_fn(feedforward)], dim=-1))


def _heads(attn: Any, projected: Float[Tensor, "b tokens all"]) -> Float[Tensor, "b tokens heads width"]:
    return projected.unflatten(-1, (-1, attn.head_dim))


def _rotated(embedding: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys after the rotary embedding of their tokens' positions."""
    from diffusers.models.embeddings import apply_rotary_emb

    rotate: Callable[..., Any] = apply_rotary_emb
    return rotate(query, embedding, sequence_dim=1), rotate(key, embedding, sequence_dim=1)
