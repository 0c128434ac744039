"""Learning-rate warmup when editing begins."""

from nerfstudio.engine.optimizers import Optimizers

WARMUP_STEPS = 50
"""Steps over which learning rates rise."""
SCENE_OPTIMIZERS = ("fields", "proposal_networks")


def apply_lr_warmup(optimizers: Optimizers, steps: int) -> None:
    """Reset the scene's optimizers at the first step of editing and scale their learning rates linearly after it.

    Reconstruction's squared error leaves Adam with second moments far too small for the gradients of editing's absolute
    error: at the full rate the first step would displace the scene, with old moments as with new ones.

    Args:
        optimizers: The run's optimizers.
        steps: Number of edit steps so far.
    """
    factor = (steps + 1) / WARMUP_STEPS
    for name in SCENE_OPTIMIZERS:
        optimizer = optimizers.optimizers[name]
        if steps == 0:
            optimizer.state.clear()
        # The scheduler sets the rate anew after each step, so factors do not accumulate.
        if factor < 1 and name in optimizers.schedulers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
