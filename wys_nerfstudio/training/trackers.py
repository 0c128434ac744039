"""The experiment trackers of nerfstudio's --vis, which need a package, an account and a network of their own."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nerfstudio.configs import base_config  # noqa: F401  # imported before the writer, which it imports in a circle
from nerfstudio.utils import writer

from wys_nerfstudio.utils.errors import WysError

TRACKERS: dict[Any, tuple[str, str, str]] = {
    writer.WandbWriter: ("wandb", "wandb", "log in with wandb login, set WANDB_MODE=offline if there is no network"),
    writer.CometWriter: ("comet", "comet_ml", "set COMET_API_KEY to the key of your account"),
}
"""Name in --vis, package and first remedy of the trackers, by nerfstudio's class."""


@contextmanager
def convert_tracker_errors() -> Iterator[None]:
    """Convert errors of a tracker that cannot be started to a `WysError`."""
    try:
        yield
    except Exception as error:  # each tracker has types of its own
        callers = (type(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__))
        tracker = next((caller for caller in callers if caller in TRACKERS), None)
        if tracker is None:
            raise
        name, package, remedy = TRACKERS[tracker]
        if isinstance(error, ImportError):
            reason, remedy = f"the package {package} cannot be imported", f"pip install {package}"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise WysError(
            f"--vis {name} does not start ({reason}): {remedy}, or train with --vis viewer+tensorboard."
        ) from error
