"""`wys compare`: what it refuses, and its table."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from wys_nerfstudio.cli import main
from wys_nerfstudio.cli.compare import measures, table


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([], "takes one run or several"),
        (["a"], 'There is no config.yml in "a"'),
        (["a", "b"], 'There is no config.yml in "a"'),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: list[str], sentence: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wys", "compare", *runs])
    with pytest.raises(SystemExit, match=sentence):
        main.entrypoint()
    assert not list(tmp_path.iterdir())


def test_table_has_every_measure_of_any_run() -> None:
    figures = [{"edit_psnr": 20.123, "edit_ssim": 0.9}, {"edit_psnr": 31.0, "clip_image_similarity": 0.75}]
    assert measures(figures) == ["edit_psnr", "edit_ssim", "clip_image_similarity"]
    console = Console(width=100, file=io.StringIO())
    console.print(table(["A", "B"], figures))
    rows = {
        row[0]: row[1:]
        for row in (line.replace("│", " ").split() for line in console.file.getvalue().splitlines())
        if row
    }
    assert rows["edit_psnr"] == ["20.1", "31.0"]
    assert rows["edit_ssim"] == ["0.900", "-"] and rows["clip_image_similarity"] == ["-", "0.750"]
