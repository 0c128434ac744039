"""Recipes: YAML files of command-line options without their leading dashes."""

import sys
from pathlib import Path
from typing import Any

import tyro
import yaml

from wys_nerfstudio.utils.errors import WysError


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
        isinstance(option, str) and option.isprintable() and isinstance(value, (str, int, float, bool))
        for option, value in content.items()
    ):
        raise WysError(
            f'The recipe "{recipe}" must consist of lines "option: value", for example "mask-threshold: 0.5".'
        )
    if "recipe" in content:
        raise WysError(f'The recipe "{recipe}" refers to another recipe: put all options into one file.')
    arguments: list[str] = []
    for option, value in content.items():
        arguments += [f"--{option}", str(value)]
    return arguments


def parse_with_recipe(method: str, recipe: Path) -> Any:
    """Parse ns-train's command line again, after a recipe's options, so that typed options override the recipe.

    Args:
        method: Name of the method.
        recipe: The recipe file.

    Returns:
        The config of the method.

    Raises:
        WysError: If the process is not ns-train, or the recipe has invalid options.
    """
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    typed_method, typed = sys.argv[1:2], sys.argv[2:]
    if typed_method != [method]:
        raise WysError("--recipe is an option of the ns-train command line: in Python, set the options themselves.")
    options = recipe_arguments(recipe)
    union: Any = AnnotatedBaseConfigUnion
    try:
        tyro.cli(union, args=[method, *options], console_outputs=False)
    except SystemExit as error:
        raise WysError(
            f'The recipe "{recipe}" has an unknown option of ns-train {method} or an invalid value: '
            f"{' '.join(options)}. See ns-train {method} --help."
        ) from error
    return tyro.cli(union, args=[method, *options, *typed])
