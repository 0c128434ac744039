"""Recipes: YAML files of options, written as they are typed but without the dashes."""

import sys
from pathlib import Path
from typing import Any

import tyro
import yaml

from wys_nerfstudio.utils.errors import WysError


def recipe_arguments(recipe: Path) -> list[str]:
    """A recipe file as command line arguments.

    Raises:
        WysError: If the file is not there, or is no flat mapping of options to values.
    """
    try:
        content = yaml.safe_load(recipe.read_text("utf8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WysError(f'The recipe "{recipe}" cannot be read: give --recipe a YAML file.') from error
    # Numbers too long, dates that are none and the like fail outside of YAML's own errors.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WysError(f'The recipe "{recipe}" is no valid YAML: {first_line}.') from error
    if not isinstance(content, dict) or not all(
        isinstance(option, str) and option.isprintable() and isinstance(value, (str, int, float, bool))
        for option, value in content.items()
    ):
        raise WysError(f'The recipe "{recipe}" must be lines of "option: value", for instance "mask-threshold: 0.5".')
    if "recipe" in content:
        raise WysError(f'The recipe "{recipe}" names another recipe: put all options into one file.')
    arguments: list[str] = []
    for option, value in content.items():
        arguments += [f"--{option}", str(value)]
    return arguments


def parse_with_recipe(method: str, recipe: Path) -> Any:
    """Parses ns-train's command line again with a recipe's options in front: of two equal options the later one counts.

    Args:
        method: The method that is trained.
        recipe: The recipe that its command line names.

    Returns:
        The method's config.

    Raises:
        WysError: If there is no such command line, or the recipe's options do not fit it.
    """
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    typed_method, typed = sys.argv[1:2], sys.argv[2:]
    if typed_method != [method]:
        raise WysError("--recipe is an option of ns-train's command line; from Python set the options themselves.")
    options = recipe_arguments(recipe)
    union: Any = AnnotatedBaseConfigUnion
    try:
        tyro.cli(union, args=[method, *options], console_outputs=False)
    except SystemExit as error:
        raise WysError(
            f'The recipe "{recipe}" has an option that ns-train {method} does not know, or a value that does not fit it: '
            f"{' '.join(options)}. See ns-train {method} --help."
        ) from error
    return tyro.cli(union, args=[method, *options, *typed])
