"""A stand-in for the torch bindings of tiny-cuda-nn: the classes, shapes and precisions that nerfstudio uses, on any device.

As there, the parameters of a module are one flat float32 vector, inputs are (batch, n_input_dims), and autocast has no effect. The
computation is rounded to half precision at the parameters, the outputs and the gradients of both. Values are not those of
tiny-cuda-nn.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

PRIMES = (1, 2654435761, 805459861)
CORNERS = tuple(itertools.product((0, 1), repeat=3))
ACTIVATIONS = {"ReLU": torch.relu, "Sigmoid": torch.sigmoid, "None": lambda x: x}


class Module(nn.Module):
    """A module with a flat parameter vector.

    Args:
        n_input_dims: Width of the inputs.
        n_output_dims: Width of the outputs.
        parameters: Initial parameters, (n,).
    """

    def __init__(self, n_input_dims: int, n_output_dims: int, parameters: Tensor) -> None:
        super().__init__()
        self.n_input_dims, self.n_output_dims, self.dtype = n_input_dims, n_output_dims, torch.float16
        self.params = nn.Parameter(parameters)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2 and x.shape[1] == self.n_input_dims, (
            f"expected (n, {self.n_input_dims}), not {tuple(x.shape)}"
        )
        with torch.autocast(x.device.type, enabled=False):
            params = self.params.half().float()
            # The sum of no parameters: tiny-cuda-nn, too, returns an empty gradient for modules without any.
            return (self.compute(x.float(), params) + params[:0].sum()).half()

    def compute(self, x: Tensor, params: Tensor) -> Tensor:
        """Return outputs (n, n_output_dims) in float32; each kind of module defines it."""
        raise NotImplementedError


class Encoding(Module):
    """An encoding of positions or directions in [0, 1]; `HashGrid` alone has parameters."""

    def __init__(self, n_input_dims: int, encoding_config: dict[str, Any], seed: int = 1337, dtype: Any = None) -> None:
        self.config = encoding_config
        kind, parameters = encoding_config["otype"], torch.zeros(0)
        if kind == "HashGrid":
            width = encoding_config["n_levels"] * encoding_config["n_features_per_level"]
            count = width << encoding_config["log2_hashmap_size"]
            # A thousand times tiny-cuda-nn's, whose encoding starts nearly constant over space.
            parameters = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 0.2 - 0.1
        elif kind == "Frequency":
            width = 2 * n_input_dims * encoding_config["n_frequencies"]
        else:
            assert kind == "SphericalHarmonics", kind
            width = encoding_config["degree"] ** 2
        super().__init__(n_input_dims, width, parameters)

    def compute(self, x: Tensor, params: Tensor) -> Tensor:
        if self.config["otype"] == "HashGrid":
            return self._hash_grid(x, params)
        if self.config["otype"] == "Frequency":
            angles = torch.cat([x * torch.pi * 2**i for i in range(self.config["n_frequencies"])], dim=1)
            return torch.cat([angles.sin(), angles.cos()], dim=1)
        powers = itertools.product(range(self.config["degree"]), repeat=3)
        lowest = sorted(powers, key=sum)[: self.n_output_dims]
        return torch.stack([x[:, 0] ** i * x[:, 1] ** j * x[:, 2] ** k for i, j, k in lowest], dim=1)

    def _hash_grid(self, x: Tensor, params: Tensor) -> Tensor:
        levels, size = self.config["n_levels"], 1 << self.config["log2_hashmap_size"]
        features = []
        for level, table in enumerate(params.view(levels, size, -1)):
            scaled = x * self.config["base_resolution"] * float(self.config["per_level_scale"]) ** level
            low = scaled.detach().floor()
            inside, total = scaled - low, 0
            for corner in CORNERS:
                weight, index = 1, 0
                for axis, side in enumerate(corner):
                    weight = weight * (inside[:, axis] if side else 1 - inside[:, axis])
                    index = index ^ ((low[:, axis].long() + side) * PRIMES[axis])
                total = total + weight[:, None] * table[index % size]  # type: ignore
            features.append(total)
        return torch.cat(features, dim=1)  # type: ignore


class Network(Module):
    """A multilayer perceptron without biases."""

    def __init__(self, n_input_dims: int, n_output_dims: int, network_config: dict[str, Any], seed: int = 1337) -> None:
        width, hidden = network_config["n_neurons"], network_config["n_hidden_layers"]
        assert network_config["otype"] == "CutlassMLP" or width in (16, 32, 64, 128), network_config
        self.config = network_config
        sizes = [n_input_dims, *[width] * hidden, n_output_dims]
        self.shapes = list(zip(sizes[1:], sizes))
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5 for shape in self.shapes]
        super().__init__(n_input_dims, n_output_dims, torch.cat([weight.flatten() for weight in weights]))

    def compute(self, x: Tensor, params: Tensor) -> Tensor:
        weights = params.split([rows * columns for rows, columns in self.shapes])
        for i, (shape, weight) in enumerate(zip(self.shapes, weights)):
            last = i == len(self.shapes) - 1
            activation = ACTIVATIONS[self.config["output_activation" if last else "activation"]]
            x = activation(x @ weight.view(shape).T)
        return x


class NetworkWithInputEncoding(Module):
    """An encoding and a network with one vector of parameters, the network's first."""

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding_config: dict[str, Any],
        network_config: dict[str, Any],
        seed: int = 1337,
    ) -> None:
        encoding = Encoding(n_input_dims, encoding_config, seed)
        network = Network(encoding.n_output_dims, n_output_dims, network_config, seed)
        super().__init__(n_input_dims, n_output_dims, torch.cat([network.params, encoding.params]).detach())
        self.count = network.params.numel()
        self.parts = (network.compute, encoding.compute)  # bound methods, so that their parameters are not registered

    def compute(self, x: Tensor, params: Tensor) -> Tensor:
        network, encoding = self.parts
        return network(encoding(x, params[self.count :]), params[: self.count])
