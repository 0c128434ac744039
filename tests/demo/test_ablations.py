"""The ablations' table and what their command refuses; the runs themselves take an hour."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from wys_nerfstudio import cli
from wys_nerfstudio.demo.ablations import VARIANTS, table
from wys_nerfstudio.options import Localization


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["wys", "ablate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.entrypoint()
    sentence = str(stopped.value.code)
    assert sentence.startswith("wys: ") and "\n" not in sentence
    return sentence


def test_what_cannot_be_ablated_is_refused_before_any_training(tmp_path: Path, monkeypatch) -> None:
    assert "--seeds must be at least 1, not 0" in refusal(monkeypatch, "-o", tmp_path, "--seeds", 0)
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "transforms.json").write_text("{}")
    sentence = refusal(monkeypatch, "-o", tmp_path, "--instruction", "make it purple")
    assert 'The demo scene has no truth of "make it purple"' in sentence
    assert not (tmp_path / "runs").exists()


def test_every_way_to_confine_an_edit_takes_part() -> None:
    assert set(VARIANTS) == set(Localization.__args__)  # type: ignore


def test_the_table_has_the_mean_and_the_spread_over_seeds() -> None:
    figures = {
        "before": [{"truth_psnr_outside": 37.54}],
        "relevance-field": [
            {"truth_psnr_outside": 37.0, "mask_iou": 0.5},
            {"truth_psnr_outside": 36.0, "mask_iou": 0.75},
        ],
    }
    console = Console(width=120, file=io.StringIO())
    console.print(table(figures))
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[0]] == ["before", "37.5", "-"]
    assert [cell.strip() for cell in rows[1]] == ["relevance field", "36.5 (36.0 to 37.0)", "0.62 (0.50 to 0.75)"]
