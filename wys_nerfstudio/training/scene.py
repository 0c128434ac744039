"""What the edit loop needs of a scene and of its training views.

Another scene representation is another class with these methods; nothing in the training room changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from wys_nerfstudio.editing import Editor, EditSettings
from wys_nerfstudio.editing.editor import EditorProfile
from wys_nerfstudio.training.settings import RunSettings


@runtime_checkable
class Scene(Protocol):
    """A scene representation that is rendered and trained."""

    @property
    def device(self) -> torch.device:
        """Device of the scene."""
        ...

    def render_pixels(
        self, cameras: Cameras, view: int, where: Bool[Tensor, "h w"]
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Render pixels of a training view with its own pose correction and appearance, without gradients.

        Args:
            cameras: The training cameras.
            view: Index of the view.
            where: Pixels to render. Its shape is the size of the render, for the camera's field of view.

        Returns:
            Color in [0, 1], relevance in [0, 1] and depth along the ray of these pixels, row by row.
        """
        ...

    def pose_corrected_camera(self, cameras: Cameras, view: int) -> Cameras:
        """Return one of the training cameras with its own pose correction."""
        ...

    def needs_visual_hull(self) -> bool:
        """Return whether free-space relevance of the current instruction is still unknown."""
        ...

    def build_visual_hull(
        self,
        cameras: Cameras,
        maps: Float[Tensor, "b mh mw"],
        unclamped_maps: Float[Tensor, "b uh uw"],
        depths: Float[Tensor, "b lh lw"],
        given_masks: bool = False,
    ) -> None:
        """Compute free-space relevance from the maps of all views.

        Args:
            cameras: The training cameras.
            maps: Relevance maps in [0, 1], of any size.
            unclamped_maps: The same maps before outliers were clamped, of any size.
            depths: Depth along the rays of a grid over each view.
            given_masks: The maps are given masks, for which no relevance head is trained: they define relevance on surfaces, too.
        """
        ...

    def reset_relevance(self) -> None:
        """Forget all relevance: another instruction follows."""
        ...


@dataclass
class EditInput:
    """Render of a view that an edit starts from, and where the view may change."""

    view: int
    """Index of the view."""
    render: Float[Tensor, "edit_h edit_w 3"]
    """The scene as it is now, in [0, 1], at most as large as the view is edited; zeros where it was not rendered."""
    rendered: Bool[Tensor, "edit_h edit_w"]
    """Pixels that were rendered: those that may change, and a margin."""
    relevance: Float[Tensor, "h w"]
    """The field's relevance at the view's size; interpolated from one value per latent where it was not rendered."""
    mask: Bool[Tensor, "h w"]
    """Pixels that may change."""


@runtime_checkable
class TrainingViews(Protocol):
    """The training views: captured, edited, and their relevance maps. Indices are those of the training cameras."""

    @property
    def num_views(self) -> int:
        """Number of training views."""
        ...

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width of the views."""
        ...

    @property
    def view_names(self) -> list[str]:
        """A file name stem per view."""
        ...

    @property
    def cameras(self) -> Cameras:
        """Cameras of the training views."""
        ...

    @property
    def relevance_maps(self) -> "Optional[Float[Tensor, 'n mh mw'] | Bool[Tensor, 'n h w']]":
        """Relevance maps of the views in [0, 1], of any size, or given masks; None without."""
        ...

    @property
    def unclamped_maps(self) -> "Optional[Float[Tensor, 'n uh uw'] | Bool[Tensor, 'n h w']]":
        """The relevance maps before outliers were clamped; None without."""
        ...

    edited_views: set[int]

    def captured_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return views as captured, in [0, 1]."""
        ...

    def reference_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return what edits are conditioned on and keep outside their masks, in [0, 1]."""
        ...

    def current_views(self, views: Sequence[int]) -> Float[Tensor, "b h w 3"]:
        """Return views as training uses them now, in [0, 1]."""
        ...

    def edit_views(
        self,
        editor: Editor,
        inputs: Sequence[EditInput],
        instruction: str,
        settings: EditSettings,
        *,
        strength: float,
        seeds: Sequence[int],
    ) -> Float[Tensor, "b h w 3"]:
        """Edit views, starting from renders; outside the masks the result is the reference view.

        Args:
            editor: The editor.
            inputs: Renders and masks.
            instruction: What to change.
            settings: Guidance, steps, resolution.
            strength: Noise that the renders start from, as a share of the diffusion.
            seeds: Seed of the noise of each view.
        """
        ...

    def set_view(self, view: int, image: Float[Tensor, "h w 3"]) -> None:
        """Replace a view that training uses."""
        ...


@runtime_checkable
class EditableViews(TrainingViews, Protocol):
    """Training views that ray batches are drawn from, saved and restored."""

    def use_edit_rays(self, in_patches: bool) -> None:
        """Draw ray batches of the edit phase's size."""
        ...

    def use_localize_rays(self) -> None:
        """Draw ray batches of the localize phase's size."""
        ...

    def use_reconstruction_rays(self) -> None:
        """Draw ray batches of the reconstruct phase's size."""
        ...

    def set_relevance(self, maps: Tensor, unclamped_maps: Optional[Tensor] = None) -> None:
        """Set the relevance maps of all views."""
        ...

    def write_relevance_images(self, folder: Path, instruction: str = "") -> None:
        """Write an image of each view's relevance map; without maps remove the images of earlier ones."""
        ...

    def discard_relevance(self, folder: Path) -> None:
        """Remove the relevance maps and their files: another instruction follows."""
        ...

    def start_from_captured(self) -> None:
        """Undo all edits of the views."""
        ...

    def start_from_current(self) -> None:
        """Make the views as they are now the reference of the edits to come."""
        ...

    def views_state(self) -> dict[str, Any]:
        """Return copies of the edited views and their reference in main memory, for `load_views_state`."""
        ...

    def load_views_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `views_state`."""
        ...

    def write_edited_views(self, folder: Path, state: dict[str, Any]) -> None:
        """Write the edited views of a state that have changed since the last call.

        Args:
            folder: The folder.
            state: Result of `views_state`.
        """
        ...


@runtime_checkable
class LoopOptions(Protocol):
    """Options of the edit loop that stay the same during a run."""

    seed: int
    min_strength: float
    max_strength: float

    def edit_settings(self, settings: RunSettings, profile: EditorProfile) -> EditSettings:
        """Return guidance, steps and resolution of the next edit with an editor."""
        ...

    def preview_map(self, editor: Editor, views: Any, view: int, instruction: str) -> Float[Tensor, "h w"]:
        """Return the relevance map of one view for an instruction that is not the run's."""
        ...
