"""Recipes: YAML files of options, written as they are typed but without the dashes."""

from pathlib import Path

import yaml

from wys_nerfstudio.errors import WysError


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
