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
from torch import Tensor

from wys_nerfstudio import relevance, schedule
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.editing import Editor, EditSettings
from wys_nerfstudio.errors import WysError
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.options import WysOptions
from wys_nerfstudio.ranks import gather, rank, share
from wys_nerfstudio.run_folder import EditRecord, picture_row, record_edit, show_edit


@dataclass
class Edit:
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
class Job:
    """Edits that are yet to be made, in one batch, with the settings of the moment at which they were due."""

    numbers: list[int]
    """Numbers of this rank's edits."""
    views: list[int]
    """The view of each."""
    t: int
    """Timestep that the renders are noised to."""
    renders: list[dict[str, Tensor]]
    """The model's outputs for each view."""
    masks: Bool[Tensor, "b h w"]
    """Where each view may change."""
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
        self._making: Optional[Future[list[Edit]]] = None
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
        self.put_in_place(step, folder)
        job = self._next_job()
        if self._worker is not None:
            self._making = self._worker.submit(self._make, job)
            return
        self._making = Future()
        self._making.set_result(self._make(job))
        self.put_in_place(step, folder)
        if writer.EVENT_WRITERS:  # the first rank alone has some, and it has an edit
            show_edit(step, picture_row(self._data, job.views[0], job.renders[0], job.masks[0]))

    def put_in_place(self, step: int, folder: Path) -> None:
        """Puts the edits that were due last in place, on all ranks, if that has not been done. All ranks must come here.

        Args:
            step: As for `edit`.
            folder: As for `edit`.
        """
        data, edits = self._data, self.made()
        self._making = None
        for edit in edits:
            if edit.image is not None:
                data.set_view(edit.view, edit.image)
                self.seconds_per_edit = 0.8 * (self.seconds_per_edit or edit.seconds) + 0.2 * edit.seconds
            self.skipped += edit.image is None
            name = data.view_names[edit.view]
            record_edit(folder, EditRecord(edit.number, step, name, edit.t, edit.steps, edit.mask, edit.seconds))

    def made(self) -> list[Edit]:
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
        self._making.set_result([Edit(**edit) for edit in made] if rank() == 0 else [])

    @torch.no_grad()
    def _next_job(self) -> Job:
        options, data = self._options, self._data
        began = time.perf_counter()
        numbers = share(range(self.edits, self.edits + options.edit_count))
        views = [schedule.view_of_edit(options.seed, number, data.num_views) for number in numbers]
        t = self._start_timestep(self.edits)
        self.edits += options.edit_count
        renders = [self._render(view) for view in views]
        masks = self.masks_of(views, renders) if views else torch.zeros((0, *data.view_size), dtype=torch.bool)
        settings, seconds = options.edit_settings(), time.perf_counter() - began
        return Job(numbers, views, t, renders, masks, options.instruction, settings, seconds)

    @torch.no_grad()  # which is a matter of each thread
    def _make(self, job: Job) -> list[Edit]:
        began = time.perf_counter()
        chosen = [i for i in range(len(job.views)) if job.masks[i].any()]
        images: dict[int, Tensor] = {}
        if chosen:
            edited = self._data.edited(
                self._editor(),
                [job.views[i] for i in chosen],
                torch.stack([job.renders[i]["rgb"] for i in chosen]),
                job.masks[chosen],
                job.instruction,
                job.settings,
                start_timestep=job.t,
                seeds=[schedule.edit_seed(self._options.seed, job.numbers[i]) for i in chosen],
            )
            images = dict(zip(chosen, edited.cpu()))
        steps = len(schedule.timesteps(job.t, job.settings.diffusion_steps, self._editor().num_train_timesteps))
        seconds = (job.seconds + time.perf_counter() - began) / max(1, len(job.views))
        return [
            Edit(number, job.views[i], job.t, steps, job.masks[i].cpu(), images.get(i), seconds)
            for i, number in enumerate(job.numbers)
        ]

    def _render(self, view: int) -> dict[str, Tensor]:
        """The model's outputs for a view, what edits start from: no finer than they are made, relevance at the view's size."""
        data, size = self._data, self._data.view_size
        editing_size = self._options.edit_settings().size_for(self._editor(), *size)
        finer = editing_size[0] * editing_size[1] < size[0] * size[1]
        render = self._model.render_view(data.train_dataset.cameras, view, editing_size if finer else None)
        value = relevance.resize(render["relevance_value"][None, ..., 0], *size)[0]
        return {**render, "relevance_value": value[..., None]}

    def _start_timestep(self, edit_number: int) -> int:
        options = self._options
        level = schedule.noise_level_of_edit(
            options.seed, edit_number, options.min_noise_level, options.max_noise_level
        )
        return max(1, round(level * (self._editor().num_train_timesteps - 1)))

    @torch.no_grad()
    def picture_row_of(self, view: int) -> list[Float[Tensor, "h w 3"]]:
        """The pictures of a view as of now, as `run_folder.TITLES` names them."""
        render = self._model.render_view(self._data.train_dataset.cameras, view)
        return picture_row(self._data, view, render, self.masks_of([view], [render])[0])

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
        render = self._render(view)
        if instruction == options.instruction or options.localization in ("none", "masks"):
            mask = self.masks_of([view], [render])
        else:
            request = options.relevance_request(instruction, data.reference_digest())
            view_map = data.relevance_map(self._editor(), view, request, options.relevance_outlier_factor)
            mask = relevance.threshold(view_map[None], options.mask_threshold)
        reference = data.reference_views([view])
        if self._making is not None:
            self._making.exception()  # one editor, one thing at a time
        if not mask.any():
            raise WysError(
                f"Nothing in {data.view_names[view]} is relevant at this threshold: lower it, or look elsewhere."
            )
        edited = data.edited(
            self._editor(),
            [view],
            render["rgb"][None],
            mask,
            instruction,
            options.edit_settings(),
            start_timestep=self._start_timestep(self.edits),
            seeds=[schedule.edit_seed(options.seed, self.edits)],
        )
        return reference[0].cpu(), mask[0].cpu(), edited[0].cpu()

    def masks_of(self, views: Sequence[int], renders: Sequence[dict[str, Tensor]]) -> Bool[Tensor, "b h w"]:
        """Where views may be edited, according to the chosen localisation.

        Args:
            views: Which views.
            renders: The model's outputs for them.
        """
        options, data = self._options, self._data
        if options.localization == "none" or not self._model.localized:
            return torch.ones((len(views), *data.view_size), dtype=torch.bool, device=self._model.device)
        maps = torch.stack([data.relevance_of(view) for view in views])
        if options.localization == "relevance-field":
            field = torch.stack([render["relevance_value"][..., 0] for render in renders])
            editor, (height, width) = self._editor(), data.view_size
            cell = editor.latent_factor * height / options.edit_settings().size_for(editor, height, width)[0]
            seen = relevance.threshold(maps.to(field), options.mask_threshold)
            start = relevance.threshold(field, options.mask_threshold)
            return relevance.grow(start, seen, round(options.mask_growth * cell))
        # Masks from a folder are 0 or 1 and no matter of a threshold, not even of tau = 0.
        return relevance.threshold(maps, 0.5 if options.localization == "masks" else options.mask_threshold)
