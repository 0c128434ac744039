"""The methods' Adam: the same updates as nerfstudio's, up to rounding."""

from typing import Any

import pytest
import torch
from nerfstudio.engine.optimizers import AdamOptimizerConfig

from wys_nerfstudio.config import wys, wys_small, wys_tiny
from wys_nerfstudio.training.optimizers import FusedAdamConfig


@pytest.mark.parametrize("method", [wys, wys_small, wys_tiny], ids=lambda m: m.config.method_name)
def test_all_groups_of_the_methods_have_it(method: Any) -> None:
    assert {type(group["optimizer"]) for group in method.config.optimizers.values()} == {FusedAdamConfig}


def test_steps_equal_those_of_nerfstudios_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(40, generator=generator), torch.randn(25, 40, generator=generator)
    results = []
    for config in (FusedAdamConfig, AdamOptimizerConfig):
        weights = torch.nn.Parameter(start.clone())
        optimizer = config(lr=1e-2, eps=1e-15).setup([weights])
        for gradient in gradients:
            weights.grad = gradient.clone()
            optimizer.step()
        results.append(weights.detach())
        assert bool(optimizer.defaults["fused"]) == (config is FusedAdamConfig)
    assert (results[0] - start).abs().max() > 0.02
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
