"""The sheet of both ways of editing pictures: it runs on a picture, draws, and its figures are what it prints."""

import re
from pathlib import Path

import pytest
from PIL import Image

from wys_nerfstudio.demo import sds_sheet


@pytest.mark.slow
def test_the_sheet_is_drawn_and_its_figures_are_those_of_an_edit(tmp_path: Path, capsys) -> None:
    sds_sheet.main(sds_sheet.Options(tmp_path / "sheet.png", pictures=1))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 128
    local_inside, local_outside, sds_inside, sds_outside = map(float, re.findall(r"\d+\.\d", capsys.readouterr().out))
    # Outside its mask an edit leaves nearly all as it was; inside it comes nearer to the truth than noise would.
    assert min(local_outside, sds_outside) > 25
    assert min(local_inside, sds_inside) > 5
