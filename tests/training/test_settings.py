"""The owner of the settings that change during a run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from wys_nerfstudio.editing.editor import EditDefaults
from wys_nerfstudio.relevance.localizer import available_localizations
from wys_nerfstudio.training.settings import RunSettings, Settings, label
from wys_nerfstudio.utils.errors import WysError

VALUES = RunSettings(
    instruction="make the ball blue",
    mask_threshold=0.5,
    guidance_scale=7.5,
    image_guidance_scale=1.5,
    localization="relevance-field",
    edit_every=10,
    edit_count=1,
)


def build(has_masks: bool = False) -> Settings:
    return Settings(VALUES, available_localizations(has_masks))


def test_settings_are_read_from_options_of_the_same_names():
    options = SimpleNamespace(**VALUES.as_dict(), edit_steps=4000)
    assert RunSettings.from_options(options) == VALUES


def test_options_that_are_not_given_are_the_editors():
    defaults = EditDefaults(
        guidance_scale=4.0,
        image_guidance_scale=1.0,
        diffusion_steps=20,
        solver_order=1,
        relevance_noise_level=0.8,
    )
    options = SimpleNamespace(**{**VALUES.as_dict(), "guidance_scale": None, "image_guidance_scale": None})
    settings = RunSettings.from_options(options, defaults)
    assert settings == replace(VALUES, guidance_scale=4.0, image_guidance_scale=1.0)
    assert RunSettings.from_options(SimpleNamespace(**VALUES.as_dict()), defaults) == VALUES
    without_editor = RunSettings.from_options(options)
    assert without_editor.guidance_scale is without_editor.image_guidance_scale is None
    without_editor.validate()


def test_what_the_editor_does_not_support_changes_nothing():
    def check(values: RunSettings) -> None:
        if values.image_guidance_scale != 1.5:
            raise WysError("no image guidance")

    settings = Settings(VALUES, ["none", "relevance-field"], check)
    settings.update(guidance_scale=3.0)
    with pytest.raises(WysError, match="no image guidance"):
        settings.update(image_guidance_scale=2.0)
    assert settings.current == replace(VALUES, guidance_scale=3.0)


def test_observers_receive_the_values_in_force_and_each_change():
    settings, received = build(), []
    settings.subscribe(received.append)
    settings.update(mask_threshold=0.25, edit_every=3)
    assert received == [VALUES, settings.current]
    assert (settings.current.mask_threshold, settings.current.edit_every) == (0.25, 3)
    assert settings.current.instruction == VALUES.instruction


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mask_threshold": 1.5}, "Mask threshold must be between 0 and 1, not 1.5"),
        ({"guidance_scale": float("nan")}, "Guidance scale must be a finite number of at least 0, not nan"),
        ({"image_guidance_scale": -1.0}, "Image guidance scale must be a finite number of at least 0, not -1.0"),
        ({"edit_every": 0}, "Edit every must be at least 1, not 0"),
        ({"edit_count": 0}, "Edit count must be at least 1, not 0"),
        ({"localization": "masks"}, "Localization masks is not available in this run; choose relevance-field or"),
    ],
)
def test_refused_values_change_nothing(change, sentence):
    settings, received = build(), []
    settings.subscribe(received.append)
    with pytest.raises(WysError, match=sentence):
        settings.update(**{"instruction": "make it red", **change})
    assert settings.current == VALUES and received == [VALUES]


@pytest.mark.parametrize("has_masks", [False, True])
def test_each_available_localization_can_be_chosen(has_masks):
    settings = build(has_masks)
    for localization in settings.localizations:
        settings.update(localization=localization)
        assert settings.current.localization == localization
    assert ("masks" in settings.localizations) == has_masks and "none" in settings.localizations


def test_settings_of_a_checkpoint_reach_the_observers():
    settings, received = build(), []
    settings.subscribe(received.append)
    restored = RunSettings(**{**VALUES.as_dict(), "instruction": "make it red"})
    settings.load(restored)
    assert settings.current is restored and received[-1] is restored


def test_the_localizer_has_the_settings_in_force():
    settings = build()
    settings.update(localization="none", mask_threshold=0.3)
    localizer = settings.localizer(None)
    assert (localizer.localization, localizer.mask_threshold, localizer.maps) == ("none", 0.3, None)


def test_a_label_is_the_name_in_words():
    assert label("image_guidance_scale") == "Image guidance scale"
