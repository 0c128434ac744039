"""The edit loop: renders views of the scene as it is now, decides where they may change, and edits them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import Editor, EditSettings
from wys_nerfstudio.editing.edit import check_finite
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.sampling import edit_seed
from wys_nerfstudio.relevance.localizer import Localizer
from wys_nerfstudio.training import schedule
from wys_nerfstudio.training.distributed import gather, rank, shard
from wys_nerfstudio.training.edit_log import TITLES, EditRecord, image_row, record_edit, show_edit
from wys_nerfstudio.training.scene import EditInput, LoopOptions, Scene, TrainingViews
from wys_nerfstudio.training.settings import Settings
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.progress import track
from wys_nerfstudio.utils.visualization import (
    SHEET_SIDE,
    SHEET_VIEWS,
    SOFTWARE,
    contact_sheet,
    evenly_spaced,
    limited_size,
    save_png,
)

NOT_FINITE_REMEDY = (
    "Resume with --pipeline.editor-dtype float32, and with lower guidance scales if that does not suffice."
)
"""Advice for edits that are NaN or infinite."""


@dataclass
class EditResult:
    """A computed edit; plain data, for the other processes and for checkpoints."""

    number: int
    """Number of the edit, counted from 0."""
    view: int
    """Index of the view."""
    time: "int | float"
    """The editor's time of the level that the render was noised to."""
    steps: int
    """Diffusion steps from there."""
    mask: Bool[Tensor, "h w"]
    """Pixels that may change."""
    image: Optional[Float[Tensor, "h w 3"]]
    """The edited view in [0, 1]; None if the mask is empty, so that nothing was edited."""
    seconds: float
    """Duration."""


@dataclass
class EditBatch:
    """Edits that are due, in one batch, with the settings of that moment."""

    numbers: list[int]
    """Numbers of this process's edits."""
    inputs: list[EditInput]
    """Render and mask of each."""
    strength: float
    """Noise that the renders start from, as a share of the diffusion."""
    instruction: str
    """What to change."""
    settings: EditSettings
    """Guidance, steps, resolution."""
    seconds: float
    """Duration of rendering."""


class PendingEdits:
    """Queue of edits that are computed and not yet committed. At most one batch is being computed.

    Args:
        overlap: Compute in a thread while training continues, instead of at once.
    """

    def __init__(self, overlap: bool) -> None:
        self._worker = ThreadPoolExecutor(1) if overlap else None
        self._running: Optional[Future[list[EditResult]]] = None
        self._done: list[EditResult] = []

    @property
    def overlap(self) -> bool:
        """Whether edits are computed while training continues."""
        return self._worker is not None

    def submit(self, compute: Callable[[], list[EditResult]]) -> None:
        """Compute a batch, now or in the worker thread."""
        self.wait()
        if self._worker is None:
            self._done += compute()
        else:
            self._running = self._worker.submit(compute)

    def wait(self) -> None:
        """Wait for the batch that is being computed."""
        if self._running is not None:
            running, self._running = self._running, None
            self._done += running.result()

    def peek(self) -> list[EditResult]:
        """Return the queue, after waiting for the batch that is being computed."""
        self.wait()
        return list(self._done)

    def replace(self, edits: Sequence[EditResult]) -> None:
        """Discard the queue, and what is being computed, in favor of other edits."""
        self.wait()
        self._done = list(edits)


class EditLoop:
    """Edits training views one after the other, starting from renders of the scene that is trained on them.

    Args:
        options: Options that stay the same during the run.
        settings: Options that can change during the run.
        scene: The scene.
        views: The scene's training views.
        editor: Return the editor, loading it on first use.
        overlap: Whether the editor has a device of its own and works while training continues. Its edits are committed when
            the next ones are due, however long they took, so that a run's result does not depend on timing.
    """

    def __init__(
        self,
        options: LoopOptions,
        settings: Settings,
        scene: Scene,
        views: TrainingViews,
        editor: Callable[[], Editor],
        overlap: bool = False,
    ) -> None:
        self._options, self._settings, self._scene, self._views, self._editor = options, settings, scene, views, editor
        self._queue = PendingEdits(overlap)
        self.edits = 0
        """Number of edits begun so far, skipped ones included: the number of the next edit."""
        self.skipped = 0
        """Number of edits skipped because their mask was empty."""
        self.recorded = 0
        """Number of lines in `edits.jsonl`."""
        self.paused = False
        """Whether editing is paused while training continues."""

    @property
    def overlap(self) -> bool:
        """Whether edits are computed in a thread while training continues."""
        return self._queue.overlap

    # ---------------------------------------------------------------------------------------------------------- edits

    def edit(self, step: int, folder: Path) -> None:
        """Edit the views that are next, each process its share; views with an empty mask are skipped.

        Args:
            step: The step that is about to be trained.
            folder: The run's `wys` folder, where edits are recorded.
        """
        self.commit(step, folder)
        batch = self._next_batch()
        self._queue.submit(lambda: self._compute(batch))
        if not self._queue.overlap:
            self.commit(step, folder)
            show_edit(step, self._views, batch.inputs)

    def commit(self, step: int, folder: Path) -> None:
        """Collective: put all pending edits in place and record them.

        Args:
            step: As for `edit`.
            folder: As for `edit`.
        """
        views, edits = self._views, self.pending()
        self._queue.replace([])
        for edit in edits:
            if edit.image is not None:
                views.set_view(edit.view, edit.image)
            self.skipped += edit.image is None
            name = views.view_names[edit.view]
            record_edit(folder, EditRecord(edit.number, step, name, edit.time, edit.steps, edit.mask, edit.seconds))
            self.recorded += 1

    def pending(self) -> list[EditResult]:
        """Collective: return the pending edits of all processes, in order."""
        return sorted((edit for edits in gather(self._queue.peek()) for edit in edits), key=lambda edit: edit.number)

    def load_state(self, edits: int, pending: Sequence[dict[str, Any]]) -> None:
        """Return to an earlier moment; what is being computed is discarded.

        Args:
            edits: Number of edits begun by then.
            pending: Edits that were pending then, as plain data.
        """
        self.edits = edits
        self._queue.replace([EditResult(**edit) for edit in pending] if rank() == 0 else [])

    @torch.no_grad()
    def _next_batch(self) -> EditBatch:
        settings, options = self._settings.current, self._options
        began = time.perf_counter()
        numbers = shard(range(self.edits, self.edits + settings.edit_count))
        views = [schedule.view_of_edit(options.seed, number, self._views.num_views) for number in numbers]
        strength = self._strength(self.edits)
        self.edits += settings.edit_count
        localizer = self._localizer()
        inputs = [self.prepare_edit(view, localizer) for view in views]
        edit_settings = options.edit_settings(settings, self._editor().profile)
        seconds = time.perf_counter() - began
        return EditBatch(numbers, inputs, strength, settings.instruction, edit_settings, seconds)

    @torch.no_grad()  # gradient mode is thread-local
    def _compute(self, batch: EditBatch) -> list[EditResult]:
        began = time.perf_counter()
        chosen = [i for i, edit_input in enumerate(batch.inputs) if edit_input.mask.any()]
        images: dict[int, Tensor] = {}
        if chosen:
            edited = self._views.edit_views(
                self._editor(),
                [batch.inputs[i] for i in chosen],
                batch.instruction,
                batch.settings,
                strength=batch.strength,
                seeds=[edit_seed(self._options.seed, batch.numbers[i]) for i in chosen],
            )
            self._check_edits(edited, [batch.inputs[i].view for i in chosen])
            images = dict(zip(chosen, edited.cpu()))
        levels = self._editor().noise_levels(batch.strength, batch.settings.diffusion_steps, self._latent_size())
        seconds = (batch.seconds + time.perf_counter() - began) / max(1, len(batch.inputs))
        return [
            EditResult(
                number, edit_input.view, levels[0].time, len(levels) - 1, edit_input.mask.cpu(), images.get(i), seconds
            )
            for i, (number, edit_input) in enumerate(zip(batch.numbers, batch.inputs))
        ]

    def _check_edits(self, edited: Float[Tensor, "b h w 3"], views: Sequence[int]) -> None:
        names = [f"the edit of {self._views.view_names[view]}" for view in views]
        check_finite(edited, names, NOT_FINITE_REMEDY)

    def _strength(self, edit_number: int) -> float:
        options = self._options
        return schedule.strength_of_edit(options.seed, edit_number, options.min_strength, options.max_strength)

    @torch.no_grad()
    def preview(
        self, view: int, instruction: str
    ) -> tuple[Float[Tensor, "h w 3"], Bool[Tensor, "h w"], Float[Tensor, "h w 3"]]:
        """Return what the next edit would make of a view: reference, mask, edited view. Nothing is kept.

        Args:
            view: Index of the view.
            instruction: What to change. If it is not the run's, the mask comes from a relevance map of this view alone.

        Raises:
            WysError: If nothing in this view is relevant.
        """
        options, settings, views = self._options, self._settings.current, self._views
        localizer = self._localizer()
        self._queue.wait()  # the editor does one thing at a time
        mask = None
        if instruction != settings.instruction and settings.localization not in ("none", "masks"):
            mask = localizer.mask_from(options.preview_map(self._editor(), views, view, instruction))
        edit_input = self.prepare_edit(view, localizer, mask)
        if not edit_input.mask.any():
            raise WysError(
                f"Nothing in {views.view_names[view]} is relevant at this threshold: lower it, or choose another view."
            )
        edited = views.edit_views(
            self._editor(),
            [edit_input],
            instruction,
            options.edit_settings(settings, self._editor().profile),
            strength=self._strength(self.edits),
            seeds=[edit_seed(options.seed, self.edits)],
        )
        self._check_edits(edited, [view])
        return views.reference_views([view])[0].cpu(), edit_input.mask.cpu(), edited[0].cpu()

    # ------------------------------------------------------------------------------------------------------- renders

    def _localizer(self) -> Localizer:
        return self._settings.localizer(self._views.relevance_maps)

    def prepare_edit(
        self, view: int, localizer: Optional[Localizer] = None, mask: Optional[Bool[Tensor, "h w"]] = None
    ) -> EditInput:
        """Render what the edit of a view needs: relevance once per latent, and every pixel where the view may change.

        Args:
            view: Index of the view.
            localizer: Where views may change; by default under the settings in force.
            mask: Pixels that may change, instead of the localizer's mask.
        """
        views, scene, localizer = self._views, self._scene, localizer or self._localizer()
        editing_size = self._editing_size()
        smaller = editing_size[0] * editing_size[1] < views.view_size[0] * views.view_size[1]
        size = editing_size if smaller else views.view_size
        coarse = self._render_per_latent(view)[0]
        if mask is None and not localizer.uses_field:
            mask = localizer.view_mask(view, *views.view_size).to(scene.device)
        near = localizer.near_mask(mask, coarse)
        rendered = relevance.resize(near[None].float(), *size)[0] > 0
        render = torch.zeros(*size, 3, device=scene.device)
        value = relevance.resize(coarse[None], *size)[0]
        render[rendered], value[rendered], _ = scene.render_pixels(views.cameras, view, rendered)
        value = relevance.resize(value[None], *views.view_size)[0]
        return EditInput(view, render, rendered, value, localizer.mask_from(value) if mask is None else mask)

    def _editing_size(self) -> tuple[int, int]:
        editor = self._editor()
        settings = self._options.edit_settings(self._settings.current, editor.profile)
        return settings.size_for(editor, *self._views.view_size)

    def _latent_size(self) -> tuple[int, int]:
        return self._editor().latent_size(*self._editing_size())

    def _render_per_latent(self, view: int) -> tuple[Float[Tensor, "lh lw"], Float[Tensor, "lh lw"]]:
        """Relevance and depth of a view, one value per latent."""
        cells = torch.ones(self._latent_size(), dtype=torch.bool)
        _, values, depths = self._scene.render_pixels(self._views.cameras, view, cells)
        return values.view(cells.shape), depths.view(cells.shape)

    @torch.no_grad()
    def build_visual_hull(self) -> None:
        """Compute free-space relevance from the maps of all views, unless it is known or the edit is not localized."""
        scene, views = self._scene, self._views
        if views.relevance_maps is None or not scene.needs_visual_hull():
            return
        bar = track(range(views.num_views), description="Free-space relevance")
        depths = torch.stack([self._render_per_latent(view)[1] for view in bar])
        assert views.unclamped_maps is not None
        size = depths.shape[1:]
        maps, unclamped_maps = (
            _shrink_masks(of_views, *size).to(scene.device) for of_views in (views.relevance_maps, views.unclamped_maps)
        )
        given_masks = views.relevance_maps.dtype == torch.bool
        scene.build_visual_hull(views.cameras, maps, unclamped_maps, depths, given_masks)

    @torch.no_grad()
    def write_contact_sheet(self, folder: Path, stopped: Callable[[], bool]) -> bool:
        """Write images of some views as they are now, as `edit_log.TITLES` names them. Views that are edited at a smaller size than
        that of the sheet are rendered at that size and enlarged.

        Args:
            folder: The run's `wys` folder. A sheet that is there is of an earlier moment and is removed first.
            stopped: Whether to stop; called before each render.

        Returns:
            Whether the sheet was written.
        """
        views, localizer, rows = self._views, self._localizer(), []
        (folder / "contact_sheet.png").unlink(missing_ok=True)
        size = limited_size(*views.view_size, SHEET_SIDE)
        every_pixel = torch.ones(limited_size(*size, max(self._editing_size())), dtype=torch.bool)
        shown = evenly_spaced(SHEET_VIEWS, views.num_views)
        for view in track(shown, description="Contact sheet"):
            if stopped():
                return False
            colors, values, _ = self._scene.render_pixels(views.cameras, view, every_pixel)
            value = relevance.resize(values.view(1, *every_pixel.shape), *size)[0]
            render = resize_images(colors.view(1, *every_pixel.shape, 3).clamp(0, 1), *size)[0]
            mask = localizer.mask_from(value) if localizer.uses_field else localizer.view_mask(view, *views.view_size)
            row = image_row(views, view, value, mask, SHEET_SIDE)
            rows.append((views.view_names[view], [*row, render.cpu()]))
        save_png(folder / "contact_sheet.png", contact_sheet(TITLES, rows), f"views of a scene edited with {SOFTWARE}")
        CONSOLE.print(
            f"{len(views.edited_views)} of {views.num_views} views are edited; see {folder}/contact_sheet.png."
        )
        return True


def _shrink_masks(
    maps: "Float[Tensor, 'n h w'] | Bool[Tensor, 'n h w']", height: int, width: int
) -> Float[Tensor, "n some_height some_width"]:
    """Return maps unchanged, and of given masks the share of each cell that lies inside."""
    if maps.dtype != torch.bool:
        return maps
    # Mask by mask: a whole stack of floats would take much memory.
    return torch.cat([F.adaptive_avg_pool2d(mask[None].float(), (height, width)) for mask in maps])
