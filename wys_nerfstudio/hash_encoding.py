"""nerfstudio's torch hash encoding, faster on a CPU: same tables, same values up to rounding.

Where tiny-cuda-nn is not installed, most of a training step is spent in this encoding. nerfstudio hashes each of a cell's
eight corners anew, in 64 bits with a division, and keeps every partial sum for the backward pass. Here a corner's hash is put
together from one product per axis and side, in 32 bits (only the lowest bits count, as tables have a power of two of
entries), and the backward pass knows just entries and weights.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from nerfstudio.field_components.encodings import HashEncoding
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
        scaled = in_tensor[..., None, :] * self.scalings.view(-1, 1).to(in_tensor.device)
        low = scaled.detach().floor()
        index = self._entries(low.int()).view(-1, 8)
        weights = _corner_weights(scaled - low).view(-1, 8)
        with torch.autocast(in_tensor.device.type, enabled=False):  # a lookup gains nothing from half precision
            features = _WeightedLookup.apply(self.hash_table, index, weights.float())
        return features.view(*in_tensor.shape[:-1], self.num_levels * self.features_per_level)  # type: ignore

    def _entries(self, low: Int[Tensor, "*bs levels 3"]) -> Int[Tensor, "*bs levels 8"]:
        """Entries of the corners of cells; the upper side of an axis counts 4 for x, 2 for y, 1 for z."""
        primes = torch.tensor(PRIMES, dtype=torch.int32, device=low.device)
        near = low * primes
        x, y, z = (torch.stack(sides, dim=-1) for sides in zip(near.unbind(-1), (near + primes).unbind(-1)))
        hashed = (x[..., :, None, None] ^ y[..., None, :, None] ^ z[..., None, None, :]).flatten(-3)
        return hashed.bitwise_and_(self.hash_table_size - 1) + self.hash_offset.int().to(low.device)[:, None]


def _corner_weights(offset: Float[Tensor, "*bs levels 3"]) -> Float[Tensor, "*bs levels 8"]:
    """Weights of the corners of cells, in the order of `FastHashEncoding._entries`."""
    x, y, z = (torch.stack(sides, dim=-1) for sides in zip((1 - offset).unbind(-1), offset.unbind(-1)))
    return (x[..., :, None, None] * y[..., None, :, None] * z[..., None, None, :]).flatten(-3)


class _WeightedLookup(torch.autograd.Function):
    """sum_i weights[n, i] table[index[n, i]]"""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weights)
        return torch.bmm(weights[:, None], _look_up(table, index))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> "tuple[Tensor | None, None, Tensor | None]":  # type: ignore
        table, index, weights = ctx.saved_tensors
        of_table = of_weights = None
        if ctx.needs_input_grad[0]:
            # One feature after the other: adding up rows of two is many times as slow on a CPU.
            of_table = torch.zeros(table.shape[::-1], dtype=table.dtype, device=table.device)
            entries = index.flatten().long()
            for feature, part in enumerate(gradient.unbind(-1)):
                of_table[feature].scatter_add_(0, entries, (weights * part[:, None]).flatten())
            of_table = of_table.t()
        if ctx.needs_input_grad[2]:
            of_weights = torch.bmm(_look_up(table, index), gradient[..., None])[..., 0]
        return of_table, None, of_weights


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[-1])


def speed_up_hash_encodings(module: nn.Module) -> None:
    """Gives every torch hash encoding in a module the faster forward pass; weights and their names stay.

    Args:
        module: Searched with all its children. Encodings of tiny-cuda-nn are left alone.
    """
    for child in module.modules():
        if type(child) is HashEncoding and child.tcnn_encoding is None:
            child.__class__ = FastHashEncoding
