"""nerfstudio's torch hash encoding and its scene contraction, faster on a CPU: same tables, same values up to rounding.

Where tiny-cuda-nn is not installed, most of a training step is spent in this encoding. nerfstudio hashes each of a cell's
eight corners anew, in 64 bits with a division, and keeps every partial sum for the backward pass. Here a corner's hash is put
together from one product per axis and side, in 32 bits (only the lowest bits count, as tables have a power of two of
entries), and the backward pass knows just entries and weights.

Samples are the last axis of every tensor and features are looked up one after the other: long rows are what a CPU adds,
multiplies and copies fast, and rows of two features or eight corners are not. For the same reason a largest coordinate is
found faster as such than as a norm.
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

# Instant-NGP's primes (Mueller et al. 2022, eq. 4), the second one as a 32-bit number with a sign.
PRIMES = (1, 2654435761 - 2**32, 805459861)


class FastHashEncoding(HashEncoding):
    """A `HashEncoding` of the torch backend with another forward pass."""

    def pytorch_fwd(self, in_tensor: Float[Tensor, "*bs input_dim"]) -> Float[Tensor, "*bs output_dim"]:
        """Trilinear interpolation in the hash table of each level.

        Args:
            in_tensor: Positions, at least 0; nerfstudio's fields hand over [0, 1].

        Returns:
            Features of all levels, one level after the other.
        """
        axes = in_tensor.reshape(-1, 3).t().contiguous()
        scaled = axes[:, None] * self.scalings.view(-1, 1).to(axes.device)
        low = scaled.detach().floor()
        index = self._entries(low.int())
        weights = _corner_weights(scaled - low)
        with torch.autocast(in_tensor.device.type, enabled=False):  # a lookup gains nothing from half precision
            features = _WeightedLookup.apply(self.hash_table, index, weights.float())
        width = self.num_levels * self.features_per_level
        return features.permute(2, 1, 0).reshape(*in_tensor.shape[:-1], width)  # type: ignore

    def _entries(self, low: Int[Tensor, "3 levels samples"]) -> Int[Tensor, "8 levels samples"]:
        """Entries of the corners of cells; the upper side of an axis counts 4 for x, 2 for y, 1 for z."""
        primes = torch.tensor(PRIMES, dtype=torch.int32, device=low.device).view(3, 1, 1)
        near = low * primes
        x, y, z = torch.stack([near, near + primes], dim=1)
        hashed = ((x[:, None] ^ y)[:, :, None] ^ z).flatten(0, 2)
        return hashed.bitwise_and_(self.hash_table_size - 1).add_(self.hash_offset.int().to(low.device)[:, None])


def _corner_weights(offset: Float[Tensor, "3 levels samples"]) -> Float[Tensor, "8 levels samples"]:
    """Weights of the corners of cells, in the order of `FastHashEncoding._entries`."""
    x, y, z = torch.stack([1 - offset, offset], dim=1)
    return ((x[:, None] * y)[:, :, None] * z).flatten(0, 2)


class _WeightedLookup(torch.autograd.Function):
    """sum_i weights[i, l, n] table[index[i, l, n], f], as (f, l, n)"""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weights)
        return torch.stack([values.mul_(weights).sum(0) for values in _look_up(table, index)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> "tuple[Tensor | None, None, Tensor | None]":  # type: ignore
        table, index, weights = ctx.saved_tensors
        of_table = of_weights = None
        if ctx.needs_input_grad[0]:
            of_table = torch.zeros(table.shape[::-1], dtype=table.dtype, device=table.device)
            entries = index.flatten()
            for sums, part in zip(of_table, gradient):
                sums.index_add_(0, entries, (weights * part).flatten())
            of_table = of_table.t()
        if ctx.needs_input_grad[2]:
            products = (values.mul_(part) for values, part in zip(_look_up(table, index), gradient))
            of_weights = functools.reduce(torch.add, products)
        return of_table, None, of_weights


def _look_up(table: Tensor, index: Tensor) -> Iterator[Tensor]:
    """The entries' features, one after the other, each of the index's shape."""
    for feature in table.t().contiguous():
        yield feature.index_select(0, index.flatten()).view(index.shape)


class FastSceneContraction(SceneContraction):
    """A `SceneContraction` by the largest coordinate (of infinite order) with another forward pass, for positions alone."""

    def forward(self, positions: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
        """Positions as they are within the unit cube, and drawn into the cube of twice its size outside (mip-NeRF 360,
        Barron et al. 2022, eq. 10, with the largest coordinate for the norm, as nerfacto has it)."""
        largest = positions.abs().amax(dim=-1, keepdim=True)
        return torch.where(largest < 1, positions, (2 - 1 / largest) * (positions / largest))


def use_fast_encodings(module: nn.Module) -> None:
    """Gives every torch hash encoding and scene contraction in a module its faster forward pass; weights and their names stay.

    Args:
        module: Searched with all its children. Encodings of tiny-cuda-nn are left alone, and contractions of another order.
    """
    for child in module.modules():
        if type(child) is HashEncoding and child.tcnn_encoding is None:
            child.__class__ = FastHashEncoding
        elif type(child) is SceneContraction and child.order == float("inf"):
            child.__class__ = FastSceneContraction
