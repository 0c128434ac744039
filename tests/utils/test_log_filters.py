"""Filters of third-party warnings and progress bars."""

import warnings
from pathlib import Path

import pytest
from transformers.utils import logging

from wys_nerfstudio.editing import EMBEDDED, load_editor
from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.utils.log_filters import ignore_warnings, no_progress_bar_for_local_files


def test_loading_embedded_models_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    load_editor(EMBEDDED)
    load_clip(EMBEDDED)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")
    assert logging.is_progress_bar_enabled()


def test_downloads_keep_their_progress_bars(tmp_path: Path) -> None:
    with no_progress_bar_for_local_files("timbrooks/instruct-pix2pix"):
        assert logging.is_progress_bar_enabled()
    with no_progress_bar_for_local_files(str(tmp_path)):
        assert not logging.is_progress_bar_enabled()


def test_the_progress_bar_setting_is_restored(tmp_path: Path) -> None:
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


def test_third_party_warnings_are_ignored_and_own_ones_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        ignore_warnings()
        for module in ("nerfstudio.cameras.cameras", "torch.utils.data.dataloader", "wys_nerfstudio.cli.main"):
            warnings.warn_explicit(module, UserWarning, "file.py", 1, module=module)
        for module in ("torchmetrics.utilities.prints", "torch.jit._script"):
            warnings.warn_explicit(module, FutureWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in shown] == ["wys_nerfstudio.cli.main"]
