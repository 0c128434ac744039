"""Refuses texts and paths among the options that no file system or file format can hold."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from wys_nerfstudio.utils.errors import WysError

MAX_NAME, MAX_PATH = 255, 4095
"""Bytes that Linux and macOS allow for the name of a file and for a path."""


def check_text(options: Any) -> None:
    """Refuse options with a null byte or bytes that are not UTF-8, and paths that are too long.

    Args:
        options: A dataclass of options, which may be nested.

    Raises:
        WysError: For the first such option.
    """
    for name, value in _leaves(options):
        try:
            encoded = str(value).encode("utf8")
        except UnicodeEncodeError as error:
            shown = str(value).encode("utf8", "backslashreplace").decode()
            raise WysError(f'{name} "{shown}" has bytes that are not UTF-8: type or rename it without them.') from error
        if b"\0" in encoded:
            raise WysError(f"{name} contains a null byte: leave it out.")
        if isinstance(value, Path):
            check_path(name, value)


def check_path(name: str, path: Path) -> None:
    """Refuse a path that no file system allows, or with control characters, which nerfstudio's viewer would show as markup.

    Args:
        name: The option, for the error message.
        path: The path.

    Raises:
        WysError: If it, or the name of one of its folders, is too long or contains control characters.
    """
    if not str(path).isprintable():
        raise WysError(f"{name} {str(path)!r} contains control characters: rename it without them.")
    longest = max((len(part.encode("utf8")) for part in path.parts), default=0)
    if longest > MAX_NAME:
        raise WysError(
            f"{name} has a file or folder name of {longest} bytes, and at most {MAX_NAME} are possible: shorten it."
        )
    if len(str(path).encode("utf8")) > MAX_PATH:
        raise WysError(f"{name} is a path of more than {MAX_PATH} bytes: shorten it.")


def _leaves(value: Any, name: str = "-") -> Iterator[tuple[str, Any]]:
    """Return texts and paths of nested options by their flags."""
    if isinstance(value, (str, Path)):
        yield name, value
    elif is_dataclass(value) and not isinstance(value, type):
        for option in fields(value):
            flag = f"{name}.{option.name}" if name != "-" else f"--{option.name}"
            yield from _leaves(getattr(value, option.name), flag.replace("_", "-"))
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}.{key}".replace("_", "-"))
