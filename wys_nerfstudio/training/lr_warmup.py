"""How the scene's optimizers come from reconstruction to editing."""

from nerfstudio.engine.optimizers import Optimizers

WARM_UP_STEPS = 50
"""Steps over which learning rates rise when editing begins."""
SCENE = ("fields", "proposal_networks")
"""Names of the scene's optimizers."""


def apply_lr_warmup(optimizers: Optimizers, steps: int) -> None:
    """Starts the scene's optimizers anew and brings their learning rates up slowly.

    Reconstruction's squared error leaves Adam with second moments far too small for the gradients of editing's absolute
    error: at the full rate its first step would throw the scene out of place, with old moments as with new ones.

    Args:
        optimizers: Those of the run.
        steps: Steps of editing so far.
    """
    share = (steps + 1) / WARM_UP_STEPS
    for name in SCENE:
        optimizer = optimizers.optimizers[name]
        if steps == 0:
            optimizer.state.clear()
        # A scheduler sets the rate anew after each step, so this one's factor does not pile up.
        if share < 1 and name in optimizers.schedulers:
            for group in optimizer.param_groups:
                group["lr"] *= share
