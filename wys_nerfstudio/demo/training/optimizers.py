"""Optimizers and precision of the demo's training: Muon for matrices and convolution kernels, AdamW for other parameters.

torch's Muon accepts 2-D parameters only, so kernels are passed as views of shape "out, in * height * width". It orthogonalizes in
bf16: a step takes about twice as long on CPUs without bf16 arithmetic.
"""

from collections.abc import Iterable

import torch
from torch import nn


def autocast() -> torch.autocast:
    """Return a bf16 autocast context on CPUs with AVX-512; others emulate bf16, a hundred times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() == "AVX512")


class MuonAndAdamW:
    """Muon and AdamW over one set of modules, with a common learning-rate schedule.

    AdamW optimizes biases, norms and embeddings, which cannot be orthogonalized.

    Args:
        modules: Modules to optimize.
        muon_rate: Learning rate of Muon.
        adamw_rate: Learning rate of AdamW.
    """

    def __init__(self, modules: Iterable[nn.Module], *, muon_rate: float, adamw_rate: float) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in modules:
            embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
            for parameter in module.parameters():
                (matrices if parameter.ndim > 1 and id(parameter) not in embeddings else others).append(parameter)
        self._matrices = matrices
        self._views = [nn.Parameter(p.data.view(len(p), -1)) for p in matrices]
        self.parameters = matrices + others
        muon = torch.optim.Muon(self._views, muon_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, adamw_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self._optimizers = (muon, adamw)
        self._rates = (muon_rate, adamw_rate)

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, factor: float, clip: float = 1.0) -> None:
        """Update the parameters.

        Args:
            factor: Factor of both learning rates, in [0, 1].
            clip: Maximum gradient norm.
        """
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for parameter, view in zip(self._matrices, self._views):
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        for optimizer, rate in zip(self._optimizers, self._rates):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()

    def state_dict(self) -> list[dict]:
        """Return the states of both optimizers."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, state: list[dict]) -> None:
        """Restore the states of both optimizers."""
        for optimizer, part in zip(self._optimizers, state):
            optimizer.load_state_dict(part)
