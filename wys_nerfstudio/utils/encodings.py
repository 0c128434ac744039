"""Faster CPU versions of nerfstudio's torch hash encoding and scene contraction: same tables, same values up to rounding.

Without tiny-cuda-nn, most of a training step is spent in this encoding. nerfstudio hashes each of the eight corners of a cell
separately, in 64 bits with a division, and stores every partial sum for the backward pass. Here the hash of a corner is
combined from one product per axis and side, in 32 bits (table sizes are powers of two, so only the low bits matter), and the
backward pass stores only entries and weights.

Samples are the last axis of every tensor, and features are looked up one after the other: CPU kernels are fast on long rows and
slow on rows of two features or eight corners. For the same reason, the contraction takes the maximum of the coordinates instead
of a norm.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from nerfstudio.field_components.encodings import HashEncoding
from nerfstudio.field_components.spatial_distortions import SceneContraction
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Primes of Instant-NGP (Mueller et al. 2022, eq. 4), as signed 32-bit integers.
PRIMES = (1, 2654435761 - 2**32, 805459861)


class FastHashEncoding(HashEncoding):
    """`HashEncoding` of the torch backend with a faster forward pass."""

    primes: Int[Tensor, "3 1 1"]

    def keep_constants_on_device(self) -> None:
        """Register constants as buffers: nerfstudio's plain attributes would be copied to the GPU in every pass."""
        constants = {
            "scalings": self.scalings,
            "hash_offset": self.hash_offset.int(),
            "primes": torch.tensor(PRIMES, dtype=torch.int32).view(3, 1, 1),
        }
        for name, value in constants.items():
            self.__dict__.pop(name, None)
            self.register_buffer(name, value.to(self.hash_table.device), persistent=False)

    def pytorch_fwd(self, in_tensor: Float[Tensor, "*bs input_dim"]) -> Float[Tensor, "*bs output_dim"]:
        """Interpolate trilinearly in the hash table of each level.

        Args:
            in_tensor: Non-negative positions; nerfstudio's fields use [0, 1].

        Returns:
            Features of all levels, concatenated.
        """
        axes = in_tensor.reshape(-1, 3).t().contiguous()
        scaled = axes[:, None] * self.scalings.view(-1, 1)
        low = scaled.detach().floor()
        index = self._entries(low.int())
        weights = _corner_weights(scaled - low)
        with torch.autocast(in_tensor.device.type, enabled=False):  # half precision gains nothing in a table lookup
            features = _WeightedLookup.apply(self.hash_table, index, weights.float())
        width = self.num_levels * self.features_per_level
        return features.permute(2, 1, 0).reshape(*in_tensor.shape[:-1], width)  # type: ignore

    def _entries(self, low: Int[Tensor, "3 levels samples"]) -> Int[Tensor, "8 levels samples"]:
        """Return the table indices of the corners of cells. Corner 4 i + 2 j + k is the upper side of x, y, z if i, j, k is 1."""
        lower = low * self.primes
        x, y, z = torch.stack([lower, lower + self.primes], dim=1)
        hashed = ((x[:, None] ^ y)[:, :, None] ^ z).flatten(0, 2)
        return hashed.bitwise_and_(self.hash_table_size - 1).add_(self.hash_offset[:, None])


def _corner_weights(offset: Float[Tensor, "3 levels samples"]) -> Float[Tensor, "8 levels samples"]:
    """Return the weights of the corners of cells, in the order of `FastHashEncoding._entries`."""
    x, y, z = torch.stack([1 - offset, offset], dim=1)
    return ((x[:, None] * y)[:, :, None] * z).flatten(0, 2)


class _WeightedLookup(torch.autograd.Function):
    """Weighted sums of table entries: sum_i weights[i, l, n] table[index[i, l, n], f], as (f, l, n)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weights)
        return torch.stack([values.mul_(weights).sum(0) for values in _look_up(table, index)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> "tuple[Tensor | None, None, Tensor | None]":  # type: ignore
        table, index, weights = ctx.saved_tensors
        table_grad = weights_grad = None
        if ctx.needs_input_grad[0]:
            table_grad = torch.zeros(table.shape[::-1], dtype=table.dtype, device=table.device)
            entries = index.flatten()
            for sums, part in zip(table_grad, gradient):
                sums.index_add_(0, entries, (weights * part).flatten())
            table_grad = table_grad.t()
        if ctx.needs_input_grad[2]:
            products = (values.mul_(part) for values, part in zip(_look_up(table, index), gradient))
            weights_grad = functools.reduce(torch.add, products)
        return table_grad, None, weights_grad


def _look_up(table: Tensor, index: Tensor) -> Iterator[Tensor]:
    """Yield each feature of the indexed entries, in the shape of the index."""
    for feature in table.t().contiguous():
        yield feature.index_select(0, index.flatten()).view(index.shape)


class FastSceneContraction(SceneContraction):
    """`SceneContraction` of infinite order with a faster forward pass; for positions only, not for Gaussians."""

    def forward(self, positions: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
        """Contract positions outside the unit cube into the cube of twice its size.

        Mip-NeRF 360 (Barron et al. 2022, eq. 10) with the maximum norm, as in nerfacto.
        """
        largest = positions.abs().amax(dim=-1, keepdim=True)
        return torch.where(largest < 1, positions, (2 - 1 / largest) * (positions / largest))


def use_fast_encodings(module: nn.Module) -> None:
    """Replace the forward passes of all torch hash encodings and scene contractions in a module; parameter names are unchanged.

    Args:
        module: Module that is searched recursively. tiny-cuda-nn encodings and contractions of other orders are unchanged.
    """
    for child in module.modules():
        if type(child) is HashEncoding and child.tcnn_encoding is None:
            child.__class__ = FastHashEncoding
            FastHashEncoding.keep_constants_on_device(child)  # type: ignore
        elif type(child) is SceneContraction and child.order == float("inf"):
            child.__class__ = FastSceneContraction
