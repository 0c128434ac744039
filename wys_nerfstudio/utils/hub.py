"""The Hugging Face hub without a network: one quick attempt instead of the retries of each file."""

from pathlib import Path

from wys_nerfstudio.utils.errors import WysError

TIMEOUT = 5.0
"""Seconds to wait for the hub."""


def local_if_offline(source: str, kind: str, remedy: str = 'give a local folder or "embedded"') -> str:
    """Replace a hub id by its downloaded folder if the hub cannot be reached.

    Args:
        source: Folder or hub id.
        kind: What it is, for the error.
        remedy: What to do without a network, for the error.

    Raises:
        WysError: If it is neither downloaded nor reachable.
    """
    if Path(source).is_dir() or source.startswith((".", "/", "~")) or _reachable():
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WysError(
            f'The {kind} "{source}" is not downloaded, and the Hugging Face hub cannot be reached: connect to the network '
            f"(and unset HF_HUB_OFFLINE), or {remedy}."
        ) from error


def _reachable() -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # of httpx or requests, depending on the version of huggingface_hub
        return False
    return True
