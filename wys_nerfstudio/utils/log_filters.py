"""Filters for warnings and progress bars of third-party libraries."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def ignore_warnings() -> None:
    """Ignore third-party warnings that users cannot act on, for the rest of the process."""
    # Deprecations inside nerfstudio and in its calls to torch.
    warnings.filterwarnings("ignore", module="nerfstudio")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")
    # torchmetrics warns about its own imports.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchmetrics")
    # nerfstudio's data loaders request four workers on every machine; views are small and cached.
    warnings.filterwarnings("ignore", module=r"torch\.utils\.data")


@contextmanager
def no_progress_bar_for_local_files(source: str) -> Iterator[None]:
    """Disable transformers' progress bar for local weights, which load at once; downloads keep theirs.

    Args:
        source: Local folder or hub id of the weights.
    """
    from transformers.utils import logging

    disable = Path(source).is_dir() and logging.is_progress_bar_enabled()
    if disable:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if disable:
            logging.enable_progress_bar()
