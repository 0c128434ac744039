"""Refuses option values that cannot work, before the first training step."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from wys_nerfstudio.utils.errors import WysError

SHORT_FLAGS = ("mask_threshold", "guidance_scale", "image_guidance_scale", "localization")
"""Options of the pipeline that are typed without `--pipeline.`."""


def flag(name: str, prefix: str = "pipeline.") -> str:
    """Return an option's command-line flag.

    Args:
        name: Field of the options' dataclass.
        prefix: Path of the dataclass, such as "pipeline.model.".
    """
    return f"--{'' if prefix == 'pipeline.' and name in SHORT_FLAGS else prefix}{name.replace('_', '-')}"


def minimum(value: "int | float", *names: str) -> "dict[str, int | float]":
    """Return the same minimum for several options."""
    return dict.fromkeys(names, value)


def validate_ranges(prefix: str, options: Any, minima: "Mapping[str, int | float]") -> None:
    """Refuse numbers below their minimum, infinity and NaN.

    Args:
        prefix: As for `flag`.
        options: A dataclass of options.
        minima: Smallest allowed value by field; other fields may have any finite value.

    Raises:
        WysError: For the first such option.
    """
    for option in fields(options):
        value = getattr(options, option.name)
        if isinstance(value, (int, float)):
            validate_range(flag(option.name, prefix), value, minima.get(option.name))


def validate_range(name: str, value: "int | float", least: "int | float | None" = None) -> None:
    """Refuse one number that is below its minimum or not finite.

    Args:
        name: The option as the user sees it.
        value: Its value.
        least: Its minimum.

    Raises:
        WysError: If the number cannot work.
    """
    if not math.isfinite(value):
        raise WysError(f"{name} must be a finite number, not {value}.")
    if least is not None and value < least:
        raise WysError(f"{name} must be at least {least}, not {value}.")


def validate_positive(name: str, value: "int | float") -> None:
    """Refuse a number that is not above 0 or not finite.

    Args:
        name: As for `validate_range`.
        value: Its value.

    Raises:
        WysError: If the number cannot work.
    """
    validate_range(name, value)
    if value <= 0:
        raise WysError(f"{name} must be above 0, not {value}.")


def validate_share(name: str, value: "int | float", exclusive: bool = False) -> None:
    """Refuse a number outside [0, 1].

    Args:
        name: As for `validate_range`.
        value: Its value.
        exclusive: Refuse 0 and 1 as well.

    Raises:
        WysError: If the number lies outside.
    """
    if exclusive and not 0 < value < 1:
        raise WysError(f"{name} must be above 0 and below 1, not {value}.")
    if not 0 <= value <= 1:
        raise WysError(f"{name} must be between 0 and 1, not {value}.")
