"""`wys ablate`: refusals, the table, and runs shortened to a few steps."""

import io
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nerfstudio.scripts import train
from nerfstudio.utils import writer
from PIL import Image
from rich.console import Console

from wys_nerfstudio.cli import main
from wys_nerfstudio.demo import ablations
from wys_nerfstudio.demo.ablations import VARIANTS, psnr_outside, table
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.relevance.localizer import Localization
from wys_nerfstudio.utils.visualization import write_png


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["wys", "ablate", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        main.entrypoint()
    sentence = str(error.value.code)
    assert sentence.startswith("wys: ") and "\n" not in sentence
    return sentence


def test_invalid_arguments_are_refused_before_training(tmp_path: Path, monkeypatch) -> None:
    assert "--seeds must be at least 1, not 0" in refusal(monkeypatch, "-o", tmp_path, "--seeds", 0)
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "transforms.json").write_text("{}")
    sentence = refusal(monkeypatch, "-o", tmp_path, "--instruction", "make it purple")
    assert 'The demo scene has no ground truth for "make it purple"' in sentence
    assert not (tmp_path / "runs").exists()


def test_variants_cover_every_localization() -> None:
    assert set(VARIANTS) == set(Localization.__args__)  # type: ignore


def test_the_table_shows_mean_and_range_over_seeds() -> None:
    metrics = {
        "before": [{"truth_psnr_outside": 37.54}],
        "relevance-field": [
            {"truth_psnr_outside": 37.0, "mask_iou": 0.5},
            {"truth_psnr_outside": 36.0, "mask_iou": 0.75},
        ],
        "masks": [{"truth_psnr_outside": 37.0, "mask_iou": 1.0}] * 2,
    }
    console = Console(width=120, file=io.StringIO())
    console.print(table(metrics))
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[0]] == ["before", "37.5", "-"]
    assert [cell.strip() for cell in rows[1]] == ["relevance field", "36.5 (36.0 to 37.0)", "0.62 (0.50 to 0.75)"]
    assert [cell.strip() for cell in rows[2]] == ["true masks", "37.0", "1.00"]


def test_psnr_outside_measures_changes_outside_the_masks(tmp_path: Path) -> None:
    ground_truth, targets, mask = (
        GroundTruth(tmp_path, ("", "")),
        torch.rand(2, 6, 8, 3),
        torch.zeros(2, 6, 8, dtype=torch.bool),
    )
    mask[0, 2:5, 1:4] = True
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    names = ["a.png", "b.png"]
    for name, target, inside in zip(names, targets, mask):
        write_png(tmp_path / "images" / name, target)
        Image.fromarray(inside.numpy()).save(tmp_path / "masks" / name)
    edits = {name: ground_truth.edited(name) for name in names}
    edits["a.png"][2:5, 1:4] = 0.5
    assert psnr_outside(ground_truth, edits) == psnr_outside(ground_truth, {}) == float("inf")
    edits["b.png"][0, 0] += 0.25
    changed, total = 1, 2 * 6 * 8 - 9
    assert psnr_outside(ground_truth, edits) == pytest.approx(-10 * math.log10(0.25**2 * changed / total))


SHORT = """
    --machine.device-type cpu --pipeline.localize-steps 2 --pipeline.edit-steps 3 --pipeline.edit-every 2
    --pipeline.diffusion-steps 2 --pipeline.datamanager.edit-num-rays-per-batch 64
    --pipeline.datamanager.train-num-rays-per-batch 64 --pipeline.model.num-nerf-samples-per-ray 4
    --pipeline.model.log2-hashmap-size 10
""".split()


@pytest.mark.slow
def test_all_variants_are_run_from_one_reconstruction(tmp_path: Path, monkeypatch, capsys) -> None:
    runs: list[list[str]] = []
    monkeypatch.setattr(writer, "EVENT_WRITERS", [])  # writers of other tests' runs

    def run_in_process(command: list[str], check: bool) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "nerfstudio.scripts.train"]
        runs.append(command)
        steps = [] if "--base-run" in command else ["--pipeline.reconstruct-steps", "3"]
        monkeypatch.setattr(sys, "argv", ["ns-train", *command[3:], *SHORT, *steps])
        train.entrypoint()
        writer.EVENT_WRITERS.clear()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablations.subprocess, "run", run_in_process)
    monkeypatch.setattr(ablations, "write_demo_scene", partial(ablations.write_demo_scene, num_views=12))
    ablate = ["wys", "ablate", "-o", str(tmp_path), "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ablate)
    main.entrypoint()
    assert len(runs) == 1 + len(VARIANTS)
    assert ["--base-run" in command for command in runs] == [False, *[True] * len(VARIANTS)]
    metrics = json.loads((tmp_path / "ablations.json").read_text())
    assert {name: len(runs_of_variant) for name, runs_of_variant in metrics.items()} == {
        "before": 1,
        **{name: 1 for name in VARIANTS},
    }
    assert all(run["mask_iou"] == 1 for run in metrics["masks"])
    assert all(run["view_psnr_outside"] == float("inf") for run in metrics["masks"])
    assert all(10 < run["view_psnr_outside"] < 60 for run in metrics["none"])
    assert all(0 < run["mask_iou"] < 0.3 for run in metrics["none"])
    assert (tmp_path / "contact_sheet.png").is_file() and "true masks" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ablate)
    main.entrypoint()  # reuses the finished runs
    assert len(runs) == 1 + len(VARIANTS)


@pytest.mark.slow
def test_a_failed_variant_ends_with_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ablations.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    monkeypatch.setattr(ablations, "write_demo_scene", partial(ablations.write_demo_scene, num_views=3))
    assert "Training of this variant failed" in refusal(monkeypatch, "-o", tmp_path)
