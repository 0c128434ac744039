"""Edit masks: which pixels of a view an edit may change.

The only place that turns a choice of localization, a threshold and relevance into a mask.
"""

from dataclasses import dataclass
from typing import Literal, Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wys_nerfstudio.relevance.maps import dilate, latent_mask, resize, threshold

Localization = Literal["relevance-field", "relevance-map", "masks", "none"]
"""Renders of the relevance field (the method), the views' own relevance maps (ablation F), given masks (ablation G), or no
localization (Instruct-NeRF2NeRF)."""


def available_localizations(has_masks: bool) -> tuple[Localization, ...]:
    """Return the localizations that a run can switch between; given masks replace relevance maps and field."""
    return ("masks", "none") if has_masks else ("relevance-field", "relevance-map", "none")


def trains_field(localization: Localization) -> bool:
    """Return whether a run trains the relevance field. With given masks, it cannot switch to a localization that uses it."""
    return localization in ("relevance-field", "relevance-map")


@dataclass(frozen=True)
class Localizer:
    """Edit masks of the training views under one choice of localization."""

    localization: Localization
    """Source of the masks."""
    mask_threshold: float
    """Pixels of at least this relevance are edited (tau, in [0, 1])."""
    maps: "Optional[Float[Tensor, 'n mh mw'] | Bool[Tensor, 'n h w']]"
    """Relevance maps of the views in [0, 1], of any size, or the given masks; None if the current edit has neither, so that
    every pixel may change."""

    @property
    def localized(self) -> bool:
        """Whether edits are confined at all."""
        return self.localization != "none" and self.maps is not None

    @property
    def uses_field(self) -> bool:
        """Whether masks depend on renders of the relevance field."""
        return self.localized and self.localization == "relevance-field"

    def view_mask(self, view: int, height: int, width: int) -> Bool[Tensor, "height width"]:
        """Return the edit mask of a view that does not depend on a render.

        Args:
            view: Index of the view.
            height: Height of the views in pixels.
            width: Width of the views in pixels.

        Raises:
            ValueError: If the mask depends on the relevance field.
        """
        if self.uses_field:
            raise ValueError("The mask of a view depends on a render of the relevance field.")
        if not self.localized:
            return torch.ones(height, width, dtype=torch.bool)
        assert self.maps is not None
        if self.localization == "masks":  # whatever the threshold
            return self.maps[view] > 0
        return threshold(resize(self.maps[view][None], height, width)[0], self.mask_threshold)

    def mask_from(self, relevance: Float[Tensor, "*b h w"]) -> Bool[Tensor, "*b h w"]:
        """Return the edit mask of relevance in [0, 1], for example a render of the relevance field."""
        return threshold(relevance, self.mask_threshold)

    def near_mask(self, mask: Optional[Bool[Tensor, "h w"]], coarse: Float[Tensor, "lh lw"]) -> Bool[Tensor, "lh lw"]:
        """Return the latents whose pixels may lie within the mask, with a margin of one latent.

        Args:
            mask: Mask of the view in pixels; None if it depends on the relevance field.
            coarse: The field's relevance, one value per latent.
        """
        near = self.mask_from(coarse[None]) if mask is None else latent_mask(mask[None], *coarse.shape)
        return dilate(near)[0]
