"""The edit loop: renders views of the scene as it is now, decides where they may change, and has them edited.

When edits are due is the pipeline's business, how a picture is edited that of `editing`; what an edit leaves on disk is
written by `run_folder`.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.editing import Editor, EditSettings
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.sampling import edit_seed
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training import schedule
from wys_nerfstudio.training.distributed import gather, main_process_only, rank, shard
from wys_nerfstudio.training.edit_log import TITLES, EditRecord, picture_row, record_edit, show_edit
from wys_nerfstudio.training.options import WysOptions
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import contact_sheet, evenly_spaced, save_png


@dataclass
class EditResult:
    """An edit that has been made; plain data, for the other ranks and for checkpoints."""

    number: int
    """Its number, from 0 on."""
    view: int
    """Which view."""
    t: int
    """Timestep that the render was noised to."""
    steps: int
    """Diffusion steps from there."""
    mask: Bool[Tensor, "h w"]
    """Where the view may change."""
    image: Optional[Float[Tensor, "h w 3"]]
    """The edited view; None if the mask is empty, so that there is nothing to edit."""
    seconds: float
    """How long it took."""


@dataclass
class EditInput:
    """Where an edit begins."""

    rgb: Float[Tensor, "edit_h edit_w 3"]
    """What the scene looks like now, no finer than it is edited; beyond what may change, and a margin, the reference view."""
    relevance: Float[Tensor, "h w"]
    """The field's relevance at the view's size; beyond what may change one value per latent, interpolated."""
    mask: Bool[Tensor, "h w"]
    """Where the view may change."""


@dataclass
class EditBatch:
    """Edits that are yet to be made, in one batch, with the settings of the moment at which they were due."""

    numbers: list[int]
    """Numbers of this rank's edits."""
    views: list[int]
    """The view of each."""
    strength: float
    """Noise that the renders start from, as a share of the diffusion."""
    starts: list[EditInput]
    """Where each edit begins."""
    instruction: str
    """What to change."""
    settings: EditSettings
    """Guidance, steps, resolution."""
    seconds: float
    """How long rendering took."""


class EditLoop:
    """Edits the training views one after the other, from renders of the scene that is trained on them.

    Args:
        options: The run's options; live ones may change while it goes on.
        model: The scene.
        data: Its training views.
        editor: Gives the editor; it is loaded when it is first asked for.
        overlap: Whether the editor works while training goes on, on a device of its own. What it makes is put in place when
            the next edits are due, however long it took, so that a run comes to the same each time.
    """

    def __init__(
        self,
        options: WysOptions,
        model: WysModel,
        data: WysDataManager,
        editor: Callable[[], Editor],
        overlap: bool = False,
    ) -> None:
        self._options, self._model, self._data, self._editor = options, model, data, editor
        self._worker = ThreadPoolExecutor(1) if overlap else None
        self._making: Optional[Future[list[EditResult]]] = None
        self.edits = 0
        """Edits begun so far; the next edit's number."""
        self.skipped = 0
        """Edits of this process that were skipped, because their mask was empty."""
        self.seconds_per_edit: Optional[float] = None
        """Mean over the latest edits."""
        self.paused = False
        """Whether no further views are edited for the time being."""

    def edit(self, step: int, folder: Path) -> None:
        """Edits the views whose turn it is, those with a mask that is not empty; each rank edits its share of them.

        Args:
            step: The step that is about to be trained.
            folder: The run's `wys` folder, where edits are recorded.
        """
        self.commit(step, folder)
        job = self._next_job()
        if self._worker is not None:
            self._making = self._worker.submit(self._make, job)
            return
        self._making = Future()
        self._making.set_result(self._make(job))
        self.commit(step, folder)
        if writer.EVENT_WRITERS:  # the first rank alone has some, and it has an edit
            show_edit(step, picture_row(self._data, job.views[0], job.starts[0].relevance, job.starts[0].mask))

    def commit(self, step: int, folder: Path) -> None:
        """Puts the edits that were due last in place, on all ranks, if that has not been done. All ranks must come here.

        Args:
            step: As for `edit`.
            folder: As for `edit`.
        """
        data, edits = self._data, self.pending()
        self._making = None
        for edit in edits:
            if edit.image is not None:
                data.set_view(edit.view, edit.image)
                self.seconds_per_edit = 0.8 * (self.seconds_per_edit or edit.seconds) + 0.2 * edit.seconds
            self.skipped += edit.image is None
            name = data.view_names[edit.view]
            record_edit(folder, EditRecord(edit.number, step, name, edit.t, edit.steps, edit.mask, edit.seconds))

    def pending(self) -> list[EditResult]:
        """The edits of all ranks that are not yet in place; waits for those that are being made. All ranks must come here."""
        mine = [] if self._making is None else self._making.result()
        return sorted((edit for edits in gather(mine) for edit in edits), key=lambda edit: edit.number)

    def set_state(self, edits: int, made: Sequence[dict[str, Any]]) -> None:
        """Goes back to an earlier moment; what is being made is dropped.

        Args:
            edits: Edits begun by then.
            made: What had been made and was not yet in place, as plain data.
        """
        self.edits = edits
        if self._making is not None:
            self._making.exception()
        self._making = Future()
        self._making.set_result([EditResult(**edit) for edit in made] if rank() == 0 else [])

    @torch.no_grad()
    def _next_job(self) -> EditBatch:
        options, data = self._options, self._data
        began = time.perf_counter()
        numbers = shard(range(self.edits, self.edits + options.edit_count))
        views = [schedule.view_of_edit(options.seed, number, data.num_views) for number in numbers]
        strength = self._strength(self.edits)
        self.edits += options.edit_count
        starts = [self.prepare_edit(view) for view in views]
        settings, seconds = options.edit_settings(), time.perf_counter() - began
        return EditBatch(numbers, views, strength, starts, options.instruction, settings, seconds)

    @torch.no_grad()  # which is a matter of each thread
    def _make(self, job: EditBatch) -> list[EditResult]:
        began = time.perf_counter()
        chosen = [i for i, start in enumerate(job.starts) if start.mask.any()]
        images: dict[int, Tensor] = {}
        if chosen:
            edited = self._data.edited(
                self._editor(),
                [job.views[i] for i in chosen],
                torch.stack([job.starts[i].rgb for i in chosen]),
                torch.stack([job.starts[i].mask for i in chosen]),
                job.instruction,
                job.settings,
                strength=job.strength,
                seeds=[edit_seed(self._options.seed, job.numbers[i]) for i in chosen],
            )
            images = dict(zip(chosen, edited.cpu()))
        levels = self._editor().noise_levels(job.strength, job.settings.diffusion_steps)
        first, steps = levels[0].time, len(levels) - 1
        seconds = (job.seconds + time.perf_counter() - began) / max(1, len(job.views))
        return [
            EditResult(number, job.views[i], int(first), steps, job.starts[i].mask.cpu(), images.get(i), seconds)
            for i, number in enumerate(job.numbers)
        ]

    @torch.no_grad()
    def carve_hull(self) -> None:
        """Finds what the maps of all views agree on in mid-air, before the scene as it is now, unless that is known."""
        model, cameras, hull = self._model, self._data.train_dataset.cameras, self._model.field.relevance_hull
        if hull.known or not model.localized:
            return
        views = range(len(cameras))
        bar = track(views, description="Relevance in mid-air", console=CONSOLE)
        depths = torch.stack([self._once_per_latent(view)[1] for view in bar])
        posed = cameras.to(model.device)
        posed.camera_to_worlds = torch.cat(
            [model.pose_corrected_camera(cameras, view).camera_to_worlds for view in views]
        )
        assert self._data.relevance_state is not None
        maps, unclamped_maps = (
            relevance.resize(of_views.to(model.device), *self._data.view_size)
            for of_views in self._data.relevance_state
        )
        hull.build(model.field.to_world, posed, maps, unclamped_maps, depths)

    def prepare_edit(self, view: int, mask: Optional[Bool[Tensor, "h w"]] = None) -> EditInput:
        """Renders what the edit of a view needs: relevance once per latent, and every pixel where the view may change.

        Args:
            view: Which view.
            mask: Where it may change, if the chosen localisation is not to be asked.
        """
        options, data, editor, model = self._options, self._data, self._editor(), self._model
        cameras, editing_size = data.train_dataset.cameras, options.edit_settings().size_for(editor, *data.view_size)
        finer = editing_size[0] * editing_size[1] < data.view_size[0] * data.view_size[1]
        size = editing_size if finer else data.view_size
        coarse = self._once_per_latent(view)[0][None]
        mask = self._known_mask(view) if mask is None else mask
        if mask is None:
            near = relevance.threshold(coarse, options.mask_threshold)
        else:
            near = relevance.latent_mask(mask[None], *coarse.shape[1:])
        near = relevance.dilate(near)  # as a border seldom runs along cells
        where = relevance.resize(near.float(), *size)[0] > 0
        rgb = resize_images(data.reference_views([view]).to(model.device), *size)[0]
        value = relevance.resize(coarse, *size)[0]
        rgb[where], value[where], _ = model.render_pixels(cameras, view, where)
        value = relevance.resize(value[None], *data.view_size)[0]
        return EditInput(rgb, value, self._mask_of(view, value) if mask is None else mask)

    def _once_per_latent(self, view: int) -> tuple[Float[Tensor, "lh lw"], Float[Tensor, "lh lw"]]:
        """Relevance and depth of a view as the scene is now, at the size of its latents."""
        editor = self._editor()
        size = self._options.edit_settings().size_for(editor, *self._data.view_size)
        cells = torch.ones(editor.latent_size(*size), dtype=torch.bool)
        _, values, depths = self._model.render_pixels(self._data.train_dataset.cameras, view, cells)
        return values.view(cells.shape), depths.view(cells.shape)

    def _strength(self, edit_number: int) -> float:
        options = self._options
        return schedule.noise_level_of_edit(options.seed, edit_number, options.min_strength, options.max_strength)

    @main_process_only
    @torch.no_grad()
    def write_contact_sheet(self, folder: Path) -> None:
        """Writes the pictures of some views as of now, as `run_folder.TITLES` names them.

        Args:
            folder: The run's `wys` folder.
        """
        data, rows = self._data, []
        for view in evenly_spaced(6, data.num_views):
            render = self._model.render_view(data.train_dataset.cameras, view)
            value = render["relevance_value"][..., 0]
            row = picture_row(data, view, value, self._mask_of(view, value))
            rows.append((data.view_names[view], [*row, render["rgb"].clamp(0, 1)]))
        save_png(folder / "contact_sheet.png", contact_sheet(TITLES, rows))
        edited = f"{len(data.edited_views)} of {data.num_views} views are edited"
        CONSOLE.print(f"{edited}; see {folder}/contact_sheet.png.")

    @torch.no_grad()
    def preview(
        self, view: int, instruction: str
    ) -> tuple[Float[Tensor, "h w 3"], Bool[Tensor, "h w"], Float[Tensor, "h w 3"]]:
        """What the next edit would make of a view: as it was, the mask, edited. Nothing is kept.

        Args:
            view: Which view.
            instruction: What to change. If it is not the run's, the mask comes from a relevance map of this view alone.

        Raises:
            WysError: If nothing in this view is relevant.
        """
        options, data = self._options, self._data
        mask = None
        if instruction != options.instruction and options.localization not in ("none", "masks"):
            request = options.relevance_request(instruction, data.reference_hash())
            view_map = data.relevance_map(self._editor(), view, request, options.relevance_outlier_factor)
            mask = relevance.threshold(view_map, options.mask_threshold)
        start, reference = self.prepare_edit(view, mask), data.reference_views([view])
        if self._making is not None:
            self._making.exception()  # one editor, one thing at a time
        if not start.mask.any():
            raise WysError(
                f"Nothing in {data.view_names[view]} is relevant at this threshold: lower it, or look elsewhere."
            )
        edited = data.edited(
            self._editor(),
            [view],
            start.rgb[None],
            start.mask[None],
            instruction,
            options.edit_settings(),
            strength=self._strength(self.edits),
            seeds=[edit_seed(options.seed, self.edits)],
        )
        return reference[0].cpu(), start.mask.cpu(), edited[0].cpu()

    def _known_mask(self, view: int) -> Optional[Bool[Tensor, "h w"]]:
        """Where a view may be edited, if that does not depend on the field's relevance."""
        options = self._options
        if options.localization == "none" or not self._model.localized:
            return torch.ones(self._data.view_size, dtype=torch.bool, device=self._model.device)
        if options.localization == "relevance-field":
            return None
        # Masks from a folder are 0 or 1 and no matter of a threshold, not even of tau = 0.
        threshold = 0.5 if options.localization == "masks" else options.mask_threshold
        return relevance.threshold(self._data.relevance_of(view), threshold)

    def _mask_of(self, view: int, field: Float[Tensor, "h w"]) -> Bool[Tensor, "h w"]:
        """Where a view may be edited, according to the chosen localisation.

        Args:
            view: Which view.
            field: The field's relevance, seen from there.
        """
        known = self._known_mask(view)
        return relevance.threshold(field, self._options.mask_threshold) if known is None else known
