"""`wys ablate`: refusals, the table, and runs shortened to a few steps."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import run_wys
from nerfstudio.scripts import train
from nerfstudio.utils import writer
from pages import ROOT
from PIL import Image
from rich.console import Console

from wys_nerfstudio.cli import main
from wys_nerfstudio.demo import ablations
from wys_nerfstudio.demo.ablations import METRICS, VARIANTS, psnr_outside, table
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
    for option in ("--seeds", "--reconstruct-steps", "--edit-steps"):
        assert f"{option} must be at least 1, not 0" in refusal(monkeypatch, "-o", tmp_path, option, 0)
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


def test_the_table_has_a_column_for_each_metric_of_the_page() -> None:
    every_metric = {name: 0.0 for name in METRICS}
    titles = [str(column.header) for column in table({"before": [every_metric]}).columns]
    page = json.loads((ROOT / ".github" / "benchmarks" / "ablations.json").read_text("utf8"))["columns"]
    assert titles == [page[0], page[1].removeprefix("edited "), *page[2:]] and "CLIP text-image sim." in titles


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
    --machine.device-type cpu --pipeline.localize-steps 2 --pipeline.edit-every 2
    --pipeline.diffusion-steps 2 --pipeline.datamanager.edit-num-rays-per-batch 64
    --pipeline.datamanager.train-num-rays-per-batch 64 --pipeline.model.num-nerf-samples-per-ray 4
    --pipeline.model.log2-hashmap-size 10
""".split()


class Training:
    """Stand-in for the processes of `wys ablate`: trains short runs in this process.

    Attributes:
        commands: Arguments of all runs.
        interrupt: Number of the run that stops after its first edit step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.interrupt: int | None = None
        self._patch = monkeypatch

    def run(self, command: list[str]) -> int:
        assert command[:3] == [sys.executable, "-c", ablations.TRAIN]
        self.commands.append(command[3:])
        stop = ["--max-num-iterations", "2"] if len(self.commands) - 1 == self.interrupt else []
        self._patch.setattr(sys, "argv", ["ns-train", *command[3:], *SHORT, *stop])
        train.entrypoint()
        writer.EVENT_WRITERS.clear()
        if stop:
            # The checkpoint is one of an interrupted run: config.yml has the steps of the complete one.
            run = ablations._newest_run(Path(self.option("--output-dir")).parent, self.option("--experiment-name"))
            assert run is not None
            config = (run / "config.yml").read_text().replace("max_num_iterations: 2", "max_num_iterations: 3")
            (run / "config.yml").write_text(config)
            raise KeyboardInterrupt
        return 0

    def option(self, name: str) -> str:
        return self.commands[-1][self.commands[-1].index(name) + 1]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(writer, "EVENT_WRITERS", [])  # writers of other tests' runs
    monkeypatch.setattr(ablations, "write_demo_scene", partial(ablations.write_demo_scene, num_views=10))
    result = Training(monkeypatch)
    monkeypatch.setattr(ablations, "run_child", result.run)
    return result


def ablate(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> None:
    run_wys(monkeypatch, "ablate", "-o", output, "--reconstruct-steps", 3, "--edit-steps", 3, *arguments)


@pytest.mark.slow
def test_all_variants_are_run_from_one_reconstruction(tmp_path: Path, training: Training, monkeypatch, capsys) -> None:
    ablate(monkeypatch, tmp_path, "--seeds", "1")
    commands = list(training.commands)
    assert len(commands) == 1 + len(VARIANTS)
    assert ["--base-run" in command for command in commands] == [False, *[True] * len(VARIANTS)]
    figures = json.loads((tmp_path / "ablations.json").read_text())
    assert set(figures) == {"panda-before-3", *(f"panda-{variant}-0-3-3" for variant in VARIANTS)}
    masks, none = figures["panda-masks-0-3-3"], figures["panda-none-0-3-3"]
    assert masks["mask_iou"] == 1 and masks["view_psnr_outside"] == float("inf")
    assert 10 < none["view_psnr_outside"] < 60 and 0 < none["mask_iou"] < 0.3
    assert all(-1 <= run["clip_text_image_similarity"] <= 1 for run in figures.values())
    assert (tmp_path / "contact_sheet.png").is_file() and "true masks" in capsys.readouterr().out

    # Everything is kept: nothing is trained or measured again.
    with monkeypatch.context() as patch:
        patch.setattr(ablations, "eval_setup", None)
        ablate(monkeypatch, tmp_path, "--seeds", "1")
        assert training.commands == commands
    # Other seeds are added.
    monkeypatch.setattr(ablations, "VARIANTS", {"none": VARIANTS["none"]})
    ablate(monkeypatch, tmp_path, "--seeds", "2")
    assert len(training.commands) == len(commands) + 1
    assert {name: json.loads((tmp_path / "ablations.json").read_text())[name] for name in figures} == figures


@pytest.mark.slow
def test_another_instruction_is_measured_against_its_own_truth(tmp_path: Path, training: Training, monkeypatch) -> None:
    monkeypatch.setattr(ablations, "VARIANTS", {"none": VARIANTS["none"]})
    for instruction in ("turn the bear into a panda", "make the ball blue"):
        ablate(monkeypatch, tmp_path / "both", "--seeds", "1", "--instruction", instruction)
    assert len(training.commands) == 3, "one reconstruction"
    ablate(monkeypatch, tmp_path / "own", "--seeds", "1", "--instruction", "make the ball blue")
    both, own = (json.loads((tmp_path / folder / "ablations.json").read_text()) for folder in ("both", "own"))
    assert set(own) < set(both) and len(both) == 2 * len(own)
    (before,) = (name for name in own if "before" in name)
    assert both[before] == pytest.approx(own[before], rel=1e-4)
    assert both[before]["truth_psnr_inside"] != both["panda-before-3"]["truth_psnr_inside"]


@pytest.mark.slow
def test_interrupted_variants_continue_from_their_checkpoint(
    tmp_path: Path, training: Training, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(ablations, "VARIANTS", {"none": "", "masks": ""})
    training.interrupt = 1
    with pytest.raises(SystemExit) as stopped:
        ablate(monkeypatch, tmp_path, "--seeds", "1")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("wys: Stopped; the same wys command continues.\n")
    base = json.loads((tmp_path / "ablations.json").read_text())
    training.interrupt = None
    ablate(monkeypatch, tmp_path, "--seeds", "1")
    names = [command[command.index("--experiment-name") + 1] for command in training.commands]
    assert names == ["base-3", "panda-none-0-3-3", "panda-none-0-3-3", "panda-masks-0-3-3"]
    (run,) = (tmp_path / "runs" / names[1] / "wys-tiny").iterdir()
    resumed = training.commands[2]
    assert resumed[resumed.index("--load-dir") + 1] == str(run / "nerfstudio_models")
    assert "--load-dir" not in [*training.commands[1], *training.commands[3]]
    figures = json.loads((tmp_path / "ablations.json").read_text())
    assert figures.items() > base.items()


def test_a_failed_variant_ends_with_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ablations, "run_child", lambda command: 1)
    monkeypatch.setattr(ablations, "write_demo_scene", partial(ablations.write_demo_scene, num_views=3))
    assert "Training of this variant failed" in refusal(monkeypatch, "-o", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x80"])
def test_damaged_figures_are_measured_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "ablations.json").write_text(content, "latin-1")
    assert ablations._read_figures(tmp_path / "ablations.json") == {}


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: print("saved", flush=True) or sys.exit(130))
signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
print("training", flush=True)
time.sleep(60)
"""
PARENT = (
    "import sys; from wys_nerfstudio.demo.ablations import run_child; run_child([sys.executable, '-c', sys.argv[1]])"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("everyone", [True, False], ids=["terminal", "process"])
def test_a_signal_reaches_the_trained_run_exactly_once(kind: signal.Signals, everyone: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, CHILD],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert parent.stdout is not None and parent.stdout.readline() == "training\n"
    if everyone:
        os.killpg(parent.pid, kind)  # as a terminal does
    else:
        parent.send_signal(kind)
    output, errors = parent.communicate(timeout=60)
    assert output == "saved\n" and errors.strip().endswith("KeyboardInterrupt")


@pytest.mark.slow
def test_ctrl_c_before_training_leaves_no_traceback() -> None:
    command = [sys.executable, "-W", "ignore", "-c", ablations.TRAIN, "wys-tiny"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(2)  # of about ten seconds of imports
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[1] == "" and child.returncode == 130
