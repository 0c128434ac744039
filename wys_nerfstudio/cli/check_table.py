"""Tables of `wys check`: plain text for people, plain data for JSON."""

import os
from pathlib import Path

Table = dict[str, "str | int | float"]
"""Rows: name and value, with the unit in the name."""


def format_table(title: str, table: Table) -> str:
    """Return a table as lines of plain text, with aligned values and a blank line at the end."""
    width = max(map(len, table))
    lines = [
        f"  {name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in table.items()
    ]
    return "\n".join([title, *lines, ""])


def without_home(table: Table) -> Table:
    """Return a table with "~" for the user's home folder: reports are published."""
    home = f"{Path.home()}{os.sep}"
    return {
        name: value.replace(home, f"~{os.sep}") if isinstance(value, str) else value for name, value in table.items()
    }
