"""`wys compare`: refusals and the table of metrics."""

import io
import sys
from pathlib import Path

import pytest
from conftest import run_wys, sentence_of
from rich.console import Console

from wys_nerfstudio.cli import main
from wys_nerfstudio.cli.compare import metric_names, metrics_table
from wys_nerfstudio.training.output_folder import CONFIG_TAG


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "takes one or more runs"),
        (["a"], 'There is no config.yml in "a"'),
        (["a", "b"], 'There is no config.yml in "a"'),
    ],
)
def test_invalid_runs_are_refused(runs: list[str], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wys", "compare", *runs])
    with pytest.raises(SystemExit, match=message):
        main.entrypoint()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["run", "run/wys", "run/new", "other/../run/wys"])
def test_an_output_inside_a_run_is_refused(output: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run/wys", "other"):
        Path(folder).mkdir(parents=True)
    Path("run/config.yml").write_text(f"{CONFIG_TAG}\nmethod_name: wys")
    Path("run/wys/contact_sheet.png").write_text("as it was")
    monkeypatch.setattr(sys, "argv", ["wys", "compare", "run", "-o", output])
    with pytest.raises(SystemExit, match='is inside the run "run": give -o another folder.'):
        main.entrypoint()
    assert Path("run/wys/contact_sheet.png").read_text() == "as it was" and not Path("run/new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", '"run" is not a wys run: wys compare takes runs of'),
        ("!!python/object:nerfstudio.engine.trainer.TrainerConfig\nmethod_name: nerfacto", '"run" is not a wys run'),
        (f"{CONFIG_TAG}\n{{", '"run/config.yml" cannot be read: '),
        (CONFIG_TAG, '"run/config.yml" does not contain the options of a run'),
    ],
)
def test_runs_of_other_methods_and_damaged_ones_are_refused(content: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yml").write_text(content)
    assert message in sentence_of(lambda: run_wys(monkeypatch, "compare", "run"))
    assert not Path("wys-compare").exists()


def test_the_table_lists_the_metrics_of_all_runs() -> None:
    metrics = [{"edit_psnr": 20.123, "edit_ssim": 0.9}, {"edit_psnr": 31.0, "clip_image_similarity": 0.75}]
    assert metric_names(metrics) == ["edit_psnr", "edit_ssim", "clip_image_similarity"]
    console = Console(width=100, file=io.StringIO())
    console.print(metrics_table(["A", "B"], metrics))
    rows = {
        row[0]: row[1:]
        for row in (line.replace("│", " ").split() for line in console.file.getvalue().splitlines())
        if row
    }
    assert rows["edit_psnr"] == ["20.1", "31.0"]
    assert rows["edit_ssim"] == ["0.900", "-"] and rows["clip_image_similarity"] == ["-", "0.750"]
