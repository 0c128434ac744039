"""When things happen in a run: phases, the order in which views are edited, noise strengths. Pure Python."""

import random
from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """The three phases of a run, in order."""

    RECONSTRUCT = "reconstruct"
    """Plain nerfacto on the captured views."""
    LOCALIZE = "localize"
    """Only the relevance head is trained, on the relevance maps of the views."""
    EDIT = "edit"
    """Views are edited one after another while the scene is trained on them."""


@dataclass(frozen=True)
class PhaseSchedule:
    """Number of steps of each phase; a phase of 0 steps is skipped."""

    reconstruct_steps: int
    """Steps of plain reconstruction."""
    localize_steps: int
    """Steps of training the relevance head alone."""
    edit_steps: int
    """Steps of training on edited views."""

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.reconstruct_steps + self.localize_steps + self.edit_steps

    @property
    def edit_start(self) -> int:
        """First step of the edit phase, counted from 0."""
        return self.reconstruct_steps + self.localize_steps

    def phase(self, step: int) -> Phase:
        """Return the phase of a step, counted from 0; steps after the last one belong to the edit phase."""
        if step < self.reconstruct_steps:
            return Phase.RECONSTRUCT
        return Phase.LOCALIZE if step < self.edit_start else Phase.EDIT

    def edits_due(self, step: int, every: int) -> bool:
        """Return whether views are edited before a step: at the first step of the edit phase and every `every` steps
        after it."""
        return step >= self.edit_start and (step - self.edit_start) % every == 0


def view_of_edit(seed: int, edit_number: int, num_views: int) -> int:
    """Return the view of an edit. Each round visits every view once, in a new random order.

    Args:
        seed: Seed of the run.
        edit_number: Number of the edit, counted from 0.
        num_views: Number of views, at least 1.

    Returns:
        Index of a view in [0, num_views).
    """
    edit_round, position = divmod(edit_number, num_views)
    order = list(range(num_views))
    random.Random(f"{seed}/round/{edit_round}").shuffle(order)
    return order[position]


def strength_of_edit(seed: int, edit_number: int, low: float, high: float) -> float:
    """Return the noise strength that an edit starts from, t ~ U[low, high], as a share of the diffusion's length."""
    return random.Random(f"{seed}/level/{edit_number}").uniform(low, high)
