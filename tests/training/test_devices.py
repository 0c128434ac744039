"""Devices of a run with one or several GPUs, through the command line; `device_count` is emulated."""

import sys
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import sentence_of, write_ring_scene
from nerfstudio.scripts import train

from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.devices import has_own_device


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("devices") / "scene", width=20, height=16, views=4)


@pytest.fixture
def launched(scene: Path, tmp_path: Path, monkeypatch):
    """Run ns-train on a machine with three GPUs, and return the config with which ranks would be started."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    configs: list[Any] = []
    monkeypatch.setattr(train, "launch", lambda **options: configs.append(options["config"]))

    def run(*arguments: str) -> Any:
        fixed = [f"--data={scene}", f"--output-dir={tmp_path}", "--instruction=make it red", "--vis=tensorboard"]
        monkeypatch.setattr(sys, "argv", ["ns-train", "wys", *fixed, *arguments])
        train.entrypoint()
        return configs.pop()

    return run


def editor_option(device: Optional[str]) -> list[str]:
    return [] if device is None else ["--pipeline.editor-device", device]


@pytest.mark.parametrize(
    ("devices", "editor", "own"),
    [(1, None, False), (1, "cuda", False), (1, "cuda:0", False), (1, "cuda:1", True), (1, "cpu", True),
     (2, None, False), (2, "cuda:2", True), (2, "cpu", True), (3, None, False), (3, "cpu", True)],
)  # fmt: skip
def test_all_ranks_decide_alike_whether_edits_overlap(devices, editor, own, launched):
    config = launched("--machine.num-devices", str(devices), *editor_option(editor))
    decisions = {has_own_device(config.pipeline.editor_device, f"cuda:{rank}", devices) for rank in range(devices)}
    assert decisions == {own}


@pytest.mark.parametrize("editor", [None, "cuda", "cuda:0", "cuda:1", "cuda:2", "cpu"])
def test_the_decision_to_overlap_does_not_depend_on_the_rank(editor):
    assert len({has_own_device(editor, f"cuda:{rank}", 2) for rank in range(2)}) == 1


@pytest.mark.parametrize(("devices", "editor"), [(2, "cuda"), (2, "cuda:0"), (2, "cuda:1"), (3, "cuda:2")])
def test_a_training_device_of_several_is_refused_for_the_editor(devices, editor, launched):
    message = sentence_of(lambda: launched("--machine.num-devices", str(devices), *editor_option(editor)))
    assert f"--pipeline.editor-device {editor} is one of the {devices} training devices: leave it out" in message
    assert f"from cuda:{devices} on" in message


@pytest.mark.parametrize(("editor", "own"), [(None, False), ("cpu", False), ("cuda:1", True)])
def test_an_editor_overlaps_training_on_the_cpu_only_on_a_gpu(editor, own):
    assert {has_own_device(editor, "cpu", processes) for processes in (1, 2)} == {own}


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_makes_its_gpu_the_current_device(rank, launched, monkeypatch):
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    trainer = WysTrainer(launched("--machine.num-devices", "2"), local_rank=rank, world_size=2)
    assert current == [trainer.device] == [f"cuda:{rank}"]


def test_training_on_the_cpu_selects_no_gpu(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail(str(device)))
    WysTrainer(launched("--machine.device-type", "cpu"))


@pytest.mark.parametrize("devices", [1, 2])
def test_errors_of_the_launcher_are_shortened_for_several_ranks(devices, launched):
    before = sys.excepthook
    launched("--machine.num-devices", str(devices))
    assert (sys.excepthook is before) == (devices == 1)
