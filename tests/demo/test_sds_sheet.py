"""Comparison of local edits and SDS: contact sheet and printed metrics."""

import re
from pathlib import Path

import pytest
from PIL import Image

from wys_nerfstudio.demo import sds_sheet


@pytest.mark.slow
def test_the_sheet_is_written_and_metrics_are_plausible(tmp_path: Path, capsys) -> None:
    sds_sheet.main(sds_sheet.Options(tmp_path / "sheet.png", images=1))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 128
    local_inside, local_outside, sds_inside, sds_outside = map(float, re.findall(r"\d+\.\d", capsys.readouterr().out))
    # Edits preserve the image outside the mask, and are closer to the ground truth than noise inside.
    assert min(local_outside, sds_outside) > 25
    assert min(local_inside, sds_inside) > 5
