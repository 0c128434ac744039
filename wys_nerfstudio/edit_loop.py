"""The edit loop: renders views of the scene as it is now, decides where they may change, and has them edited.

When edits are due is the pipeline's business, how a picture is edited that of `editing`; what an edit leaves on disk is
written by `run_folder`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Bool, Float
from nerfstudio.utils import writer
from torch import Tensor

from wys_nerfstudio import relevance, schedule
from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.editing import Editor
from wys_nerfstudio.errors import WysError
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.options import WysOptions
from wys_nerfstudio.ranks import gather, share
from wys_nerfstudio.run_folder import EditRecord, picture_row, record_edit, show_edit


@dataclass
class Edit:
    """An edit that has been made, as the ranks tell it to each other."""

    number: int
    """Its number, from 0 on."""
    view: int
    """Which view."""
    mask: Bool[Tensor, "h w"]
    """Where the view may change."""
    image: Optional[Float[Tensor, "h w 3"]]
    """The edited view; None if the mask is empty, so that there is nothing to edit."""
    seconds: float
    """How long it took."""


class EditLoop:
    """Edits the training views one after the other, from renders of the scene that is trained on them.

    Args:
        options: The run's options; live ones may change while it goes on.
        model: The scene.
        data: Its training views.
        editor: Gives the editor; it is loaded when it is first asked for.
    """

    def __init__(
        self, options: WysOptions, model: WysModel, data: WysDataManager, editor: Callable[[], Editor]
    ) -> None:
        self._options, self._model, self._data, self._editor = options, model, data, editor
        self.edits = 0
        """Edits begun so far; the next edit's number."""
        self.skipped = 0
        """Edits of this process that were skipped, because their mask was empty."""
        self.seconds_per_edit: Optional[float] = None
        """Mean over the latest edits."""
        self.paused = False
        """Whether no further views are edited for the time being."""

    @torch.no_grad()
    def edit(self, step: int, folder: Path) -> None:
        """Edits the views whose turn it is, those with a mask that is not empty; each rank edits its share of them.

        Args:
            step: The step that is about to be trained.
            folder: The run's `wys` folder, where edits are recorded.
        """
        options, data = self._options, self._data
        numbers = share(range(self.edits, self.edits + options.edit_count))
        t = self._start_timestep(self.edits)
        self.edits += options.edit_count
        mine, first_render = self._make_edits(numbers, t) if numbers else ([], {})
        edits = sorted((edit for edits in gather(mine) for edit in edits), key=lambda edit: edit.number)
        steps = len(schedule.timesteps(t, options.diffusion_steps, self._editor().num_train_timesteps))
        for edit in edits:
            if edit.image is not None:
                data.set_view(edit.view, edit.image)
                self.seconds_per_edit = 0.8 * (self.seconds_per_edit or edit.seconds) + 0.2 * edit.seconds
            self.skipped += edit.image is None
            name = data.view_names[edit.view]
            record_edit(folder, EditRecord(edit.number, step, name, t, steps, edit.mask, edit.seconds))
        if writer.EVENT_WRITERS:  # the first rank alone has some, and it has an edit
            show_edit(step, picture_row(data, mine[0].view, first_render, mine[0].mask))

    def _make_edits(self, numbers: Sequence[int], t: int) -> tuple[list[Edit], dict[str, Tensor]]:
        """Makes edits, all in one batch, without putting them in place; also returns the render that the first began from."""
        options, data = self._options, self._data
        began = time.perf_counter()
        views = [schedule.view_of_edit(options.seed, number, data.num_views) for number in numbers]
        renders = [self._model.render_view(data.train_dataset.cameras, view) for view in views]
        masks = self.masks_of(views, renders)
        chosen = [i for i in range(len(views)) if masks[i].any()]
        images: dict[int, Tensor] = {}
        if chosen:
            edited = data.edited(
                self._editor(),
                [views[i] for i in chosen],
                torch.stack([renders[i]["rgb"] for i in chosen]),
                masks[chosen],
                options.instruction,
                options.edit_settings(),
                start_timestep=t,
                seeds=[schedule.edit_seed(options.seed, numbers[i]) for i in chosen],
            )
            images = dict(zip(chosen, edited.cpu()))
        seconds = (time.perf_counter() - began) / len(views)
        edits = [Edit(number, views[i], masks[i].cpu(), images.get(i), seconds) for i, number in enumerate(numbers)]
        return edits, renders[0]

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
        render = self._model.render_view(data.train_dataset.cameras, view)
        if instruction == options.instruction or options.localization in ("none", "masks"):
            mask = self.masks_of([view], [render])
        else:
            request = options.relevance_request(instruction, data.reference_digest())
            view_map = data.relevance_map(self._editor(), view, request, options.relevance_outlier_factor)
            mask = relevance.threshold(view_map[None], options.mask_threshold)
        reference = data.reference_views([view])
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
