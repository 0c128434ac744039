"""What happens when: phases of a run, the order in which views are edited, noise levels of edits. Pure Python.

Nothing here touches a tensor or a file, so a schedule can be printed, compared and tested by itself.
"""

import random
from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """The three parts of a run, in their order."""

    RECONSTRUCT = "reconstruct"
    """Plain nerfacto on the captured views."""
    LOCALIZE = "localize"
    """Only the relevance head is trained, on the maps of the captured views."""
    EDIT = "edit"
    """Views are edited one after another while the scene is trained on them."""


@dataclass(frozen=True)
class PhaseSchedule:
    """How many steps each phase takes; a phase of 0 steps is skipped."""

    reconstruct_steps: int
    """Steps of plain reconstruction."""
    localize_steps: int
    """Steps of training the relevance head alone."""
    edit_steps: int
    """Steps of training on edited views."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.reconstruct_steps + self.localize_steps + self.edit_steps

    @property
    def edit_start(self) -> int:
        """First step of the edit phase, counted from 0."""
        return self.reconstruct_steps + self.localize_steps

    def phase(self, step: int) -> Phase:
        """Phase of a step, counted from 0; steps past the end belong to the edit phase."""
        if step < self.reconstruct_steps:
            return Phase.RECONSTRUCT
        return Phase.LOCALIZE if step < self.edit_start else Phase.EDIT

    def edits_due(self, step: int, every: int) -> bool:
        """Whether views are edited before this step: at the edit phase's first step and every `every` steps from there."""
        return step >= self.edit_start and (step - self.edit_start) % every == 0


def view_of_edit(seed: int, edit_number: int, num_views: int) -> int:
    """The view that an edit works on: every view once per round, each round in a new random order.

    Args:
        seed: The run's seed.
        edit_number: Number of the edit, from 0 on.
        num_views: How many views there are, at least 1.

    Returns:
        A view's index in [0, num_views).
    """
    edit_round, position = divmod(edit_number, num_views)
    order = list(range(num_views))
    random.Random(f"{seed}/round/{edit_round}").shuffle(order)
    return order[position]


def noise_level_of_edit(seed: int, edit_number: int, low: float, high: float) -> float:
    """The noise level t ~ U[low, high] that an edit starts from, in fractions of the diffusion's length."""
    return random.Random(f"{seed}/level/{edit_number}").uniform(low, high)
