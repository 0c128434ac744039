"""Refusal of option values that cannot work."""

from dataclasses import dataclass

import pytest

from wys_nerfstudio.training.validation import flag, minimum, validate_ranges, validate_share
from wys_nerfstudio.utils.errors import WysError


@dataclass
class Options:
    steps: int = 1
    learning_rate: float = 0.1
    name: str = "x"
    enabled: bool = False


def test_flags_are_those_of_the_command_line():
    assert flag("mask_threshold") == "--mask-threshold"
    assert flag("edit_every") == "--pipeline.edit-every"
    assert flag("mask_threshold", "pipeline.model.") == "--pipeline.model.mask-threshold"


def test_minimum_is_shared_by_several_options():
    assert minimum(2, "a", "b") == {"a": 2, "b": 2}


def test_values_at_their_minimum_are_accepted():
    validate_ranges("pipeline.", Options(steps=0, learning_rate=-5.0), {"steps": 0})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (Options(steps=0), "--pipeline.model.steps must be at least 1, not 0."),
        (Options(learning_rate=float("inf")), "--pipeline.model.learning-rate must be a finite number, not inf."),
        (Options(learning_rate=float("nan")), "--pipeline.model.learning-rate must be a finite number, not nan."),
    ],
)
def test_numbers_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(WysError) as error:
        validate_ranges("pipeline.model.", options, {"steps": 1})
    assert str(error.value) == sentence


@pytest.mark.parametrize(("value", "exclusive"), [(0.0, False), (1.0, False), (0.5, True)])
def test_shares_within_the_unit_interval_are_accepted(value, exclusive):
    validate_share("--x", value, exclusive)


@pytest.mark.parametrize(
    ("value", "exclusive", "sentence"),
    [
        (-0.1, False, "--x must be between 0 and 1, not -0.1."),
        (1.1, False, "--x must be between 0 and 1, not 1.1."),
        (float("nan"), False, "--x must be between 0 and 1, not nan."),
        (0.0, True, "--x must be above 0 and below 1, not 0.0."),
        (1.0, True, "--x must be above 0 and below 1, not 1.0."),
    ],
)
def test_shares_outside_the_unit_interval_are_refused(value, exclusive, sentence):
    with pytest.raises(WysError) as error:
        validate_share("--x", value, exclusive)
    assert str(error.value) == sentence
