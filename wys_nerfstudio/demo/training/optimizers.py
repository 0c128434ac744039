"""How the demo's networks are trained: Muon on matrices and convolution kernels, AdamW on everything else, and in which precision.

torch's own Muon takes 2-D parameters only, so kernels are handed to it as views of shape "out, in * height * width". It
orthogonalizes in bf16, so on a CPU without that a step takes about twice as long.
"""

from collections.abc import Iterable

import torch
from torch import nn


def autocast() -> torch.autocast:
    """bf16 where the CPU computes with it; one without AVX-512 only emulates it, a hundred times as slowly as fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() == "AVX512")


class MuonAndAdamW:
    """Two optimizers over one set of modules, with learning rates that fall together.

    Biases, norms and embeddings have no matrix to orthogonalize, hence AdamW.
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
        """Forgets all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, factor: float, clip: float = 1.0) -> None:
        """One step on the gradients at hand.

        Args:
            factor: of both learning rates, in [0, 1].
            clip: largest gradient norm.
        """
        torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for parameter, view in zip(self._matrices, self._views):
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        for optimizer, rate in zip(self._optimizers, self._rates):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()

    def state_dict(self) -> list[dict]:
        """What `load_state_dict` needs to go on."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, state: list[dict]) -> None:
        """Goes on where `state_dict` was taken."""
        for optimizer, part in zip(self._optimizers, state):
            optimizer.load_state_dict(part)
