"""Where views may change, for each localization."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.relevance import resize
from wys_nerfstudio.relevance.localizer import Localizer, available_localizations

HEIGHT, WIDTH = 16, 24


def maps(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_given_masks_replace_maps_and_field():
    assert available_localizations(has_masks=True) == ("masks", "none")
    assert available_localizations(has_masks=False) == ("relevance-field", "relevance-map", "none")


def test_relevance_maps_are_thresholded():
    localizer = Localizer("relevance-map", 0.7, maps())
    assert localizer.localized and not localizer.uses_field
    assert torch.equal(localizer.view_mask(1, HEIGHT, WIDTH), maps()[1] >= 0.7)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_given_masks_do_not_depend_on_the_threshold(tau):
    masks = maps() > 0.5
    assert torch.equal(Localizer("masks", tau, masks).view_mask(0, HEIGHT, WIDTH), masks[0])


@pytest.mark.parametrize(
    ("localization", "given_maps"),
    [("none", maps()), ("none", None), ("relevance-field", None), ("relevance-map", None)],
)
def test_without_localization_every_pixel_may_change(localization, given_maps):
    localizer = Localizer(localization, 0.9, given_maps)
    assert not localizer.localized and not localizer.uses_field
    assert localizer.view_mask(0, HEIGHT, WIDTH).all()


def test_masks_from_the_field_need_a_render():
    localizer = Localizer("relevance-field", 0.5, maps())
    assert localizer.uses_field
    with pytest.raises(ValueError, match="depends on a render"):
        localizer.view_mask(0, HEIGHT, WIDTH)
    assert torch.equal(localizer.mask_from(maps()[0]), maps()[0] >= 0.5)


@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_latents_near_a_mask_cover_all_its_pixels(seed, tau):
    mask = maps(seed)[0] >= tau
    near = Localizer("relevance-map", tau, maps(seed)).near_mask(mask, torch.zeros(4, 6))
    covered = near.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (covered | ~mask).all()


def test_latents_near_a_mask_have_a_margin_of_one():
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[8, 9] = True  # latent (2, 2)
    near = Localizer("masks", 0.5, maps()).near_mask(mask, torch.zeros(4, 6))
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(near, expected)


@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_latents_near_a_field_cover_its_interpolated_mask(seed, tau):
    coarse = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))
    localizer = Localizer("relevance-field", tau, maps())
    covered = localizer.near_mask(None, coarse).repeat_interleave(4, 0).repeat_interleave(4, 1)
    mask = localizer.mask_from(resize(coarse[None], HEIGHT, WIDTH)[0])
    assert (covered | ~mask).all()
