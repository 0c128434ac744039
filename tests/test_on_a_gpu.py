"""Runs on a GPU as far as they can be tried without one: nothing of the GPU meets anything of the CPU (`emulated_gpu.py`)."""

import json
import sys
from pathlib import Path

import pytest
import torch
from emulated_gpu import OnGpu, emulated_gpu
from nerfstudio.scripts import eval as ns_eval
from nerfstudio.scripts import train
from nerfstudio.utils import writer
from torch import nn

from wys_nerfstudio.training.checkpoint import find_checkpoint, read_checkpoint, register_safe_globals

register_safe_globals()


def test_what_a_gpu_refuses_is_refused() -> None:
    with emulated_gpu():
        there, here = torch.rand(3, 4, device="cuda"), torch.rand(3, 4)
        for meeting in (
            lambda: there + here,
            lambda: here + there,
            lambda: here[there > 0.5],
            lambda: torch.cat([here, there]),
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                meeting()
        with torch.autocast("cuda"):
            assert (there @ there.T).dtype == torch.float16
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        assert (there * torch.tensor(2.0)).device == there[torch.tensor([0, 2])].device == torch.device("cuda:0")
        here.copy_(there)
        assert torch.equal(here, there.cpu()) and here.device.type == "cpu"
    assert not torch.cuda.is_available()


def test_networks_are_trained_there_as_here() -> None:
    weights = []
    for device in ("cpu", "cuda"):
        with emulated_gpu():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(device)
            optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
            inputs = torch.rand(16, 4, device=device)
            for _ in range(5):
                optimizer.zero_grad()
                (network(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean().backward()
                optimizer.step()
            assert all(isinstance(p, OnGpu) == (device == "cuda") for p in network.parameters())
            weights.append([p.detach().cpu() for p in network.parameters()])
    assert all(map(torch.equal, *weights))


SHORT = """
    --vis tensorboard --timestamp run --pipeline.reconstruct-steps 3 --pipeline.localize-steps 2 --pipeline.edit-steps 5
    --pipeline.edit-every 2 --pipeline.edit-count 2 --pipeline.diffusion-steps 3 --pipeline.editor-dtype float32
    --pipeline.model.num-nerf-samples-per-ray 4 --pipeline.datamanager.train-num-rays-per-batch 64
    --pipeline.datamanager.edit-num-rays-per-batch 64 --pipeline.model.camera-optimizer.mode SO3xR3
""".split()


def ns_train(monkeypatch: pytest.MonkeyPatch, scene: Path, editor: Path, output: Path, *arguments: object) -> Path:
    """A short run of wys-tiny in this process; its folder."""
    monkeypatch.setattr(writer, "EVENT_WRITERS", [])  # other tests' runs, whose folders may be gone
    command = ["ns-train", "wys-tiny", "--data", scene, "--editor", editor, "--output-dir", output, *SHORT]
    command += ["--instruction", "make the ball blue", *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    train.entrypoint()
    writer.EVENT_WRITERS.clear()
    return output / "ring" / "wys-tiny" / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--mask-threshold", "0.3"],
        ["--localization", "relevance-map", "--pipeline.datamanager.images-on-gpu", "False"],
        ["--localization", "none", "--pipeline.model.lpips-loss-mult", "1", "--pipeline.datamanager.edit-patch-size", "32",
         "--pipeline.datamanager.edit-num-rays-per-batch", "1024"],
    ],
    ids=["field", "map, views in main memory", "nothing, LPIPS"],
)  # fmt: skip
def test_a_whole_run_comes_to_the_same_there(
    options: list[str], ring_scene: Path, editor_folder: Path, torch_home: Path, tmp_path: Path, monkeypatch
) -> None:
    weights = []
    for device in ("cpu", "cuda"):
        arguments = ["--machine.device-type", device, *options]
        with emulated_gpu():
            run = ns_train(monkeypatch, ring_scene, editor_folder, tmp_path / device, *arguments)
        weights.append(read_checkpoint(find_checkpoint(run, "--load-dir"))["pipeline"])
        assert len(list((run / "wys" / "edits").glob("*.png"))) == 6
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=0, rtol=0, msg=name)
    figures = tmp_path / "figures.json"
    arguments = ["ns-eval", "--load-config", str(run / "config.yml"), "--output-path", str(figures)]
    monkeypatch.setattr(sys, "argv", arguments)
    with emulated_gpu():
        ns_eval.entrypoint()
    assert "edit_psnr" in json.loads(figures.read_text())["results"]["edit"]["mean"]


@pytest.mark.slow
def test_half_precision_trains_there(ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """What `wys` does on a GPU; on the CPU nerfstudio switches it off."""
    arguments = ["--machine.device-type", "cuda", "--mixed-precision", "True", "--mask-threshold", "0"]
    with emulated_gpu():
        run = ns_train(monkeypatch, ring_scene, editor_folder, tmp_path, *arguments)
    captured, edited = (
        read_checkpoint(path)["pipeline"]
        for path in (run / "wys" / "captured.ckpt", find_checkpoint(run, "--load-dir"))
    )
    assert all(value.isfinite().all() for value in edited.values() if value.is_floating_point())
    moved = {name for name, value in edited.items() if not torch.equal(value, captured[name])}
    assert any("mlp_head" in name for name in moved) and any("mlp_base" in name for name in moved)
