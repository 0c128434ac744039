"""Learning rates of a resumed run."""

from typing import Any

from nerfstudio.engine.optimizers import Optimizers


def use_typed_rates(optimizers: Optimizers, options: dict[str, Any]) -> None:
    """Let optimizers and schedulers continue from the options' learning rates; nerfstudio restores those of the checkpoint.

    Args:
        optimizers: The run's optimizers, with the state of the checkpoint.
        options: Options of the optimizers by group, as in `TrainerConfig.optimizers`.
    """
    for name, optimizer in optimizers.optimizers.items():
        rate, scheduler = options[name]["optimizer"].lr, optimizers.schedulers.get(name)
        for group in optimizer.param_groups:
            saved = group.get("initial_lr", group["lr"])
            if rate != saved:
                group["lr"] = rate * (group["lr"] / saved if saved else 1.0)
                if scheduler is not None:
                    group["initial_lr"] = rate
        if scheduler is not None:
            scheduler.base_lrs = [rate] * len(optimizer.param_groups)
