"""What other libraries would print is kept from the user's terminal where nobody can act on it, and only there."""

import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

from wys_nerfstudio.editing import EMBEDDED, load_editor
from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.utils.log_filters import ignore_warnings, no_progress_bar_for_local_files


def test_loading_what_comes_with_the_package_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    load_editor(EMBEDDED)
    load_clip(EMBEDDED)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert logging.is_progress_bar_enabled()


def test_downloads_keep_their_bars(tmp_path: Path) -> None:
    with no_progress_bar_for_local_files("timbrooks/instruct-pix2pix"):
        assert logging.is_progress_bar_enabled()
    with no_progress_bar_for_local_files(str(tmp_path)):
        assert not logging.is_progress_bar_enabled()


def test_bars_come_back_after_an_error_and_stay_off_where_they_were_off(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), no_progress_bar_for_local_files(str(tmp_path)):
        raise RuntimeError("on purpose")
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with no_progress_bar_for_local_files(str(tmp_path)):
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_warnings_of_others_are_ignored_and_our_own_are_not() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ignore_warnings()
        for module in ("nerfstudio.cameras.cameras", "torch.utils.data.dataloader", "wys_nerfstudio.cli.main"):
            warnings.warn_explicit(module, UserWarning, "file.py", 1, module=module)
        for module in ("torchmetrics.utilities.prints", "torch.jit._script"):
            warnings.warn_explicit(module, FutureWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in said] == ["wys_nerfstudio.cli.main"]
