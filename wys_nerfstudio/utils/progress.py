"""Progress bars of the terminal."""

from collections.abc import Iterable
from typing import Optional, TypeVar

from nerfstudio.utils.rich_utils import CONSOLE
from rich import progress

Value = TypeVar("Value")


def track(
    values: Iterable[Value], description: str, total: Optional[int] = None, transient: bool = False
) -> Iterable[Value]:
    """Iterate over values with a progress bar, which is drawn after each of them.

    rich's refresh threads are off: if an error leaves the loop, the bar may be collected in such a thread, which would then wait
    for itself and block every later bar of the process.

    Args:
        values: The values.
        description: What happens to them.
        total: Their number, if they have no length.
        transient: Remove the bar at the end.
    """
    return progress.track(values, description, total, console=CONSOLE, auto_refresh=False, transient=transient)
