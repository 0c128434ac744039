"""Recipes: YAML files of command-line options without their leading dashes. They come from other people and are not trusted."""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from wys_nerfstudio.utils.errors import WysError

ALLOWED = re.compile(
    r"pipeline\b|optimizers\b|prompt|max_num_iterations|mixed_precision|use_grad_scaler|gradient_accumulation_steps"
    r"|steps_per_\w+|logging\.steps_per_log|machine\.seed"
)
"""Options that recipes may set: those of the edit and its training, but no paths; the others decide where a run is written, what
it loads and what it listens on."""
REFUSED = ("pipeline.editor_allow_pickle", "pipeline.editor_device")
"""Options that recipes may not set, although their group is allowed."""


def recipe_arguments(recipe: Path) -> list[str]:
    """Read a recipe as command-line arguments.

    Raises:
        WysError: If the file cannot be read or is not a flat mapping of options to values.
    """
    try:
        content = yaml.safe_load(recipe.read_text("utf8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WysError(f'The recipe "{recipe}" cannot be read: give --recipe a YAML file.') from error
    # Overlong numbers, invalid dates and the like raise other errors than YAMLError.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WysError(f'The recipe "{recipe}" is not valid YAML: {first_line}.') from error
    if not isinstance(content, dict) or not all(
        isinstance(option, str)
        and re.fullmatch(r"[\w.-]+", option)
        and isinstance(value, (str, int, float, bool))
        and str(value).isprintable()
        for option, value in content.items()
    ):
        raise WysError(
            f'The recipe "{recipe}" must consist of lines "option: value", for example "mask-threshold: 0.5".'
        )
    if "recipe" in content:
        raise WysError(f'The recipe "{recipe}" refers to another recipe: put all options into one file.')
    # One argument per line: a value can never be read as another option.
    return [f"--{option}={value}" for option, value in content.items()]


def parse_with_recipe(method: str, recipe: Path) -> Any:
    """Parse ns-train's command line again, after a recipe's options, so that typed options override the recipe.

    Args:
        method: Name of the method.
        recipe: The recipe file.

    Returns:
        The config of the method.

    Raises:
        WysError: If the process is not ns-train, or the recipe has options that are invalid or not for recipes.
    """
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    typed_method, typed = sys.argv[1:2], sys.argv[2:]
    if typed_method != [method]:
        raise WysError("--recipe is an option of the ns-train command line: in Python, set the options themselves.")
    options = recipe_arguments(recipe)
    union: Any = AnnotatedBaseConfigUnion
    try:
        parsed = tyro.cli(union, args=[method, *options], console_outputs=False)
    except SystemExit as error:
        raise WysError(
            f'The recipe "{recipe}" has an unknown option of ns-train {method} or an invalid value: '
            f"{' '.join(options)}. See ns-train {method} --help."
        ) from error
    check_changes(recipe, tyro.cli(union, args=[method]), parsed)
    return tyro.cli(union, args=[method, *options, *typed])


def check_changes(recipe: Path, before: Any, after: Any) -> None:
    """Refuse options that recipes may not set.

    Args:
        recipe: The recipe file.
        before: Config of the method.
        after: The same with the recipe's options.

    Raises:
        WysError: If the recipe sets such an option.
    """
    for name, value in _changes("", before, after):
        if not ALLOWED.match(name) or isinstance(value, Path) or name in REFUSED:
            raise WysError(
                f'The recipe "{recipe}" sets --{name.replace("_", "-")}, which recipes cannot: type it on the command line.'
            )


def _changes(name: str, before: Any, after: Any) -> Iterator[tuple[str, Any]]:
    """Yield the options in which two configs differ, with their new values, however these were spelled."""
    if is_dataclass(before) and not isinstance(before, type) and type(before) is type(after):
        parts = [(option.name, getattr(before, option.name), getattr(after, option.name)) for option in fields(before)]
    elif isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        parts = [(key, before[key], after[key]) for key in before]
    else:
        parts = []
        if before != after:
            yield name, after
    for part, old, new in parts:
        yield from _changes(f"{name}.{part}" if name else part, old, new)
