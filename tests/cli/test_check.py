"""`wys check` from the command line: its tables on a CPU and on an emulated GPU, and what is missing as rows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import run_wys, sentence_of
from emulated_gpu import emulated_gpu
from flux2_folder import build_flux2_folder
from nerfstudio.configs.method_configs import all_methods
from test_page_commands import in_hub_cache

from wys_nerfstudio.cli import check_editor, check_machine, check_training
from wys_nerfstudio.cli.check_editor import EditorSpeed, Sample, agreement
from wys_nerfstudio.cli.check_machine import clip_place, editor_place, recommended_method
from wys_nerfstudio.cli.check_table import format_table
from wys_nerfstudio.cli.check_training import TrainingSpeed, estimate_run
from wys_nerfstudio.training.schedule import Phase

TITLES = ["Installation", "Device", "Files", "Editor", "Training on random rays"]
AGREEMENT = ("correlation of maps with float32", "IoU of masks with float32", "PSNR of edits against float32, dB")
MISSING = "not measured"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure one call of everything."""
    monkeypatch.setattr(check_editor, "REPEATS", 1)
    monkeypatch.setattr(check_training, "STEPS", 1)


def check(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> dict[str, dict[str, Any]]:
    """Run the command and return its tables, whose titles are shortened to their first words."""
    run_wys(monkeypatch, "check", "--json", folder / "report.json", *arguments)
    report = json.loads((folder / "report.json").read_text("utf8"))
    assert list(report)[:5] == TITLES and list(report)[5].startswith("Estimated minutes of a run on ")
    return {**{title: report[title] for title in TITLES}, "Estimate": list(report.values())[5]}


def run_out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_whole_report_on_a_cpu(tmp_path: Path, monkeypatch, capsys) -> None:
    report = check(monkeypatch, tmp_path, "--editor-dtype", "bfloat16", "--views", 30)
    assert report["Installation"]["torch"] == torch.__version__
    assert report["Device"]["recommended method"].startswith(
        "wys-tiny (for toy scenes; real scenes need a GPU with 8 GB"
    )
    assert report["Device"]["GPU"] == "none: torch finds no CUDA device"
    assert {report["Files"][name] for name in ("editor", "editor found", "CLIP", "CLIP found")} == {"embedded"}

    editor, training, minutes = report["Editor"], report["Training on random rays"], report["Estimate"]
    assert editor["precision"] == "bfloat16" and editor["edited at"] == "80 x 64 pixels"
    edit = editor["edit (3.0 steps on average), s"]
    assert edit == pytest.approx(3 * editor["diffusion step, s"] + editor["encoding and decoding, s"], rel=0.02)
    correlation, iou, psnr = (editor[name] for name in AGREEMENT)
    assert 0.99 < correlation < 1 and 0.9 < iou <= 1 and 35 < psnr < 100, "close to float32, but not equal"
    assert 0.2 < editor["peak memory of this process, GB"] <= training["peak memory of this process, GB"] < 100

    assert training["method"] == "wys-tiny" and training["encodings"] == "torch"
    assert minutes["relevance maps"] == pytest.approx(30 * editor["relevance map, s"] / 60)
    rays = {Phase.RECONSTRUCT: 1024, Phase.LOCALIZE: 512, Phase.EDIT: 1024}
    steps = {phase: training[f"{phase.value} step ({count} rays), s"] for phase, count in rays.items()}
    assert minutes["reconstruct (800 steps)"] == pytest.approx(800 * steps[Phase.RECONSTRUCT] / 60)
    assert minutes["localize (400 steps)"] == pytest.approx(400 * steps[Phase.LOCALIZE] / 60)
    render = 80 * 64 * training["render of a million rays, s"] / 1e6
    assert minutes["edits (at most 120 views)"] == pytest.approx(120 * (render + edit) / 60)
    assert minutes["all"] == pytest.approx(sum(minutes.values()) - minutes["all"])

    printed = capsys.readouterr().out.splitlines()
    for title in (*TITLES, "Estimated minutes of a run on 30 views"):
        assert title in printed
    assert f"  torch           {torch.__version__}" in printed


@pytest.mark.usefixtures("quick")
def test_the_report_on_an_emulated_gpu(tmp_path: Path, monkeypatch, editor_folder: Path) -> None:
    with emulated_gpu():
        report = check(monkeypatch, tmp_path, "--editor", editor_folder, "--editor-dtype", "float16")
    assert report["Device"]["device"] == "cuda" and report["Device"]["GPU"] == "emulated GPU"
    assert (report["Device"]["memory, GB"], report["Device"]["free memory, GB"]) == (8.0, 5.0)
    assert report["Device"]["recommended method"].startswith("wys-tiny")
    assert report["Editor"]["precision"] == "float16" and report["Editor"][AGREEMENT[0]] > 0.9
    assert 0 < report["Editor"]["peak memory, GB"] < 0.1  # the tensors of a small editor
    assert report["Estimate"]["all"] > 0


@pytest.mark.usefixtures("quick")
def test_the_report_on_a_flow_matching_editor(tmp_path: Path, monkeypatch) -> None:
    editor = build_flux2_folder(tmp_path / "editor", distilled=True)
    with emulated_gpu():
        report = check(monkeypatch, tmp_path, "--editor", editor)
    assert report["Editor"]["precision"] == "bfloat16" and report["Editor"]["edited at"] == "160 x 128 pixels"
    assert {*AGREEMENT} <= {*report["Editor"]} and report["Estimate"]["all"] > 0


@pytest.mark.usefixtures("quick")
def test_the_home_folder_is_not_printed(tmp_path: Path, monkeypatch, capsys, editor_folder: Path) -> None:
    home = tmp_path / "home" / "somebody"
    shutil.copytree(editor_folder, home / "editor")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    (home / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    check_machine.alexnet_file().write_bytes(b"")
    report = check(monkeypatch, tmp_path, "--editor", home / "editor")
    assert report["Files"]["editor"] == report["Files"]["editor found"] == "~/editor"
    assert report["Files"]["LPIPS (AlexNet) found"].startswith("~/torch/hub/checkpoints/alexnet")
    captured = capsys.readouterr()
    assert "somebody" not in captured.out + (tmp_path / "report.json").read_text("utf8")
    assert not {*AGREEMENT} & {*report["Editor"]}, "float32 is not compared with itself"


@pytest.mark.usefixtures("quick")
def test_what_is_missing_is_a_row(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    report = check(monkeypatch, tmp_path, "--editor", "nobody/no-such-editor")
    files = report["Files"]
    assert files["editor found"] == "not downloaded: the first edit downloads it"
    assert files["LPIPS (AlexNet) found"] == "not downloaded: wys and wys-small download it (233 MB)"
    assert files["ffmpeg"].startswith("not found: ns-render") and files["colmap"].startswith(
        "not found: ns-process-data"
    )
    assert report["Editor"]["speed"] == f"{MISSING}: not downloaded"
    minutes = report["Estimate"]
    assert minutes["relevance maps"] == minutes["edits (at most 120 views)"] == minutes["all"] == MISSING
    assert minutes["reconstruct (800 steps)"] > 0


@pytest.mark.usefixtures("quick")
def test_an_editor_that_does_not_load_is_a_row(tmp_path: Path, monkeypatch, editor_folder: Path) -> None:
    shutil.copytree(editor_folder, tmp_path / "editor")
    shutil.rmtree(tmp_path / "editor" / "vae")
    report = check(monkeypatch, tmp_path, "--editor", tmp_path / "editor")
    assert "has no vae" in report["Editor"]["speed"] and report["Estimate"]["all"] == MISSING


@pytest.mark.usefixtures("quick")
def test_what_needs_too_much_memory_is_a_row(tmp_path: Path, monkeypatch) -> None:
    load = check_editor.load_editor

    def only_in_half_precision(name: str, device: torch.device, precision: str):
        return run_out_of_memory() if precision == "float32" else load(name, device, precision)  # type: ignore

    monkeypatch.setattr(check_editor, "load_editor", only_in_half_precision)
    monkeypatch.setattr(check_training.WysModel, "get_loss_dict", run_out_of_memory)
    report = check(monkeypatch, tmp_path, "--editor-dtype", "bfloat16")
    assert report["Editor"]["agreement with float32"] == (
        f"{MISSING}: The GPU ran out of memory while the editor was measured: try --editor embedded."
    )
    assert report["Training on random rays"]["speed"] == (
        f"{MISSING}: The GPU ran out of memory while training was measured: try "
        "--pipeline.datamanager.train-num-rays-per-batch 512."
    )
    assert report["Editor"]["relevance map, s"] > 0
    assert report["Estimate"]["relevance maps"] > 0 and report["Estimate"]["edit (600 steps)"] == MISSING


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "mps"], 'The device "mps" is not supported: --device takes cpu or cuda.'),
        (["--device", "cuda:9"], 'The device "cuda:9" is not available'),
        (["--editor", "missing"], 'There is no editor folder "missing"'),
        (["--views", "0"], "--views must be at least 1, not 0."),
    ],
)
def test_invalid_arguments_are_refused(monkeypatch, capsys, arguments: list[str], sentence: str) -> None:
    assert sentence in sentence_of(lambda: run_wys(monkeypatch, "check", *arguments))
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["check", "--json", tmp_path / "file" / "report.json"]
    assert "cannot be written" in sentence_of(lambda: run_wys(monkeypatch, *arguments))
    assert capsys.readouterr().out == "", "before anything is measured"


@pytest.mark.parametrize(
    ("free_gb", "method"), [(24.0, "wys"), (8.0, "wys"), (7.9, "wys-small"), (6.0, "wys-small"), (5.9, "wys-tiny"), (None, "wys-tiny")]
)  # fmt: skip
def test_the_recommended_method_fits_the_free_memory(free_gb, method) -> None:
    assert recommended_method(free_gb) == method


def test_weights_are_found_in_the_hubs_cache(
    tmp_path: Path, monkeypatch, editor_folder: Path, clip_folder: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert editor_place("somebody/editor") is clip_place("somebody/clip") is None
    in_hub_cache(tmp_path, "somebody/editor", editor_folder)
    in_hub_cache(tmp_path, "somebody/clip", clip_folder)
    snapshot = f"snapshots/{'0' * 40}"
    assert Path(editor_place("somebody/editor") or "") == tmp_path / "models--somebody--editor" / snapshot
    assert Path(clip_place("somebody/clip") or "") == tmp_path / "models--somebody--clip" / snapshot
    for file in tmp_path.rglob("*.safetensors"):  # an interrupted download
        file.unlink()
    assert editor_place("somebody/editor") is clip_place("somebody/clip") is None
    assert editor_place(str(editor_folder)) == str(editor_folder) and clip_place(str(clip_folder)) == str(clip_folder)


def test_the_estimate_counts_steps_maps_and_edits() -> None:
    config: Any = all_methods["wys"]
    editing = EditorSpeed((512, 512), map_seconds=1.5, step_seconds=0.2, coding_seconds=1.0, mean_steps=10.0)
    training = TrainingSpeed(dict(zip(Phase, (0.1, 0.05, 0.2))), ray_seconds=1e-5)
    assert estimate_run(config, 40, editing, training) == pytest.approx(
        {
            "reconstruct (30000 steps)": 50.0,
            "localize (500 steps)": 500 * 0.05 / 60,
            "edit (4000 steps)": 4000 * 0.2 / 60,
            "relevance maps": 1.0,
            "edits (at most 400 views)": 400 * (2.62144 + 3.0) / 60,
            "all": 50 + 500 * 0.05 / 60 + 4000 * 0.2 / 60 + 1 + 400 * 5.62144 / 60,
        }
    )


def test_agreement_is_measured_on_maps_masks_and_edits() -> None:
    options: Any = all_methods["wys-tiny"].pipeline
    torch.manual_seed(0)
    exact = Sample(torch.rand(1, 8, 10), torch.rand(32, 40, 3))
    assert agreement(exact, exact, options) == pytest.approx(dict(zip(AGREEMENT, (1.0, 1.0, float("inf")))))
    inverted = replace(exact, raw_map=1 - exact.raw_map, edited=exact.edited * 0.9)
    correlation, iou, psnr = agreement(inverted, exact, options).values()
    assert correlation == pytest.approx(-1) and 0 < float(iou) < 0.9 and 20 < float(psnr) < 30


def test_tables_are_aligned_plain_text() -> None:
    assert format_table("Speed", {"map, s": 0.123456, "steps": 30000}) == "Speed\n  map, s  0.1235\n  steps   30000\n"
