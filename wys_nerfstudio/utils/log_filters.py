"""What other libraries say that users can do nothing about; each kind of it is silenced here, with its reason."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def ignore_warnings() -> None:
    """Silences warnings from here on, in this package's own commands and in nerfstudio's when they run its methods."""
    # Deprecations inside nerfstudio and in its calls of torch.
    warnings.filterwarnings("ignore", module="nerfstudio")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")
    # torchmetrics says this of its own imports.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchmetrics")
    # nerfstudio's loaders of views want four workers, whatever the machine; views are small and cached.
    warnings.filterwarnings("ignore", module=r"torch\.utils\.data")


@contextmanager
def no_progress_bar_for_local_files(source: str) -> Iterator[None]:
    """Keeps transformers from drawing a progress bar for weights that are on disk and there at once; of what has to be
    downloaded its bars are wanted.

    Args:
        source: Local folder or hub id of what is loaded.
    """
    from transformers.utils import logging

    silence = Path(source).is_dir() and logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()
