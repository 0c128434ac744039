"""Learning rates of resumed runs."""

from copy import deepcopy

import pytest
import torch
from nerfstudio.engine.optimizers import AdamOptimizerConfig, Optimizers
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig

from wys_nerfstudio.training.learning_rates import use_typed_rates


def build(rates: dict[str, float]) -> tuple[Optimizers, dict]:
    """Return optimizers of a group with a schedule and one without, and their options."""
    options = {
        "fields": {
            "optimizer": AdamOptimizerConfig(lr=rates["fields"]),
            "scheduler": ExponentialDecaySchedulerConfig(lr_final=1e-4, max_steps=100),
        },
        "relevance": {"optimizer": AdamOptimizerConfig(lr=rates["relevance"]), "scheduler": None},
    }
    weights = {name: [torch.nn.Parameter(torch.ones(2))] for name in options}
    return Optimizers(deepcopy(options), weights), options


def train(optimizers: Optimizers, steps: int) -> dict[str, float]:
    """Return the learning rates after some steps."""
    for step in range(steps):
        optimizers.optimizer_step_all()
        optimizers.scheduler_step_all(step)
    return {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.optimizers.items()}


def resume(saved: Optimizers, rates: dict[str, float]) -> Optimizers:
    resumed, options = build(rates)
    resumed.load_optimizers({name: deepcopy(o.state_dict()) for name, o in saved.optimizers.items()})
    resumed.load_schedulers({name: deepcopy(s.state_dict()) for name, s in saved.schedulers.items()})
    use_typed_rates(resumed, options)
    return resumed


@pytest.mark.parametrize("typed", [{"fields": 1e-2, "relevance": 3e-3}, {"fields": 1e-3, "relevance": 7e-4}])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_trains_with_the_typed_rates(typed: dict[str, float]) -> None:
    saved, reference = build({"fields": 1e-2, "relevance": 3e-3})[0], build(typed)[0]
    before = train(saved, 7)
    train(reference, 7)
    resumed = resume(saved, typed)
    if typed["fields"] == 1e-2:
        assert train(resumed, 0) == before
    assert train(resumed, 3) == train(reference, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_rate_of_zero_can_be_raised() -> None:
    saved = build({"fields": 1e-2, "relevance": 0.0})[0]
    train(saved, 2)
    assert train(resume(saved, {"fields": 1e-2, "relevance": 1e-3}), 1)["relevance"] == 1e-3
