"""Runs on an emulated GPU (`emulated_gpu.py`): tensors on different devices are never combined, and results equal the CPU's."""

import json
import sys
from pathlib import Path

import pytest
import torch
from emulated_gpu import OnGpu, emulated_gpu, transfers
from nerfstudio.scripts import eval as ns_eval
from nerfstudio.scripts import train
from nerfstudio.utils import writer
from torch import nn

from wys_nerfstudio.editing import load_editor, relevance_maps
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.checkpoint import find_checkpoint, read_checkpoint, register_safe_globals
from wys_nerfstudio.training.run_state import SETTINGS_KEY

register_safe_globals()


def test_the_emulation_raises_the_errors_of_a_gpu() -> None:
    with emulated_gpu():
        on_gpu, on_cpu = torch.rand(3, 4, device="cuda"), torch.rand(3, 4)
        for combine in (
            lambda: on_gpu + on_cpu,
            lambda: on_cpu + on_gpu,
            lambda: on_cpu[on_gpu > 0.5],
            lambda: torch.cat([on_cpu, on_gpu]),
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                combine()
        with torch.autocast("cuda"):
            assert (on_gpu @ on_gpu.T).dtype == torch.float16
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            on_gpu.numpy()
        assert (on_gpu * torch.tensor(2.0)).device == on_gpu[torch.tensor([0, 2])].device == torch.device("cuda:0")
        on_cpu.copy_(on_gpu)
        assert torch.equal(on_cpu, on_gpu.cpu()) and on_cpu.device.type == "cpu"
    assert not torch.cuda.is_available()


def test_the_emulation_records_waits_and_copies() -> None:
    with emulated_gpu(), transfers.recorded(__name__) as places:
        on_gpu = torch.rand(3, 4, device="cuda")
        (on_gpu * 2)[torch.tensor([0], device="cuda").to("cuda")].sum(dim=0)  # copies the values of the index
        assert {place.rsplit(": ")[-1] for place in places} == {"copy"}
        places.clear()
        torch.rand(3).pin_memory().to("cuda", non_blocking=True)
        assert not places
        for wait in (on_gpu.cpu, on_gpu[0, 0].item, on_gpu.tolist, on_gpu.nonzero, lambda: on_gpu[on_gpu > 0.5]):
            wait()
            assert {place.rsplit(": ")[-1] for place in places} == {"wait"}
            places.clear()
        on_gpu[torch.tensor([0, 2])]
        assert {place.rsplit(": ")[-1] for place in places} == {"copy"}


def test_training_on_the_emulated_gpu_equals_the_cpu() -> None:
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


def test_the_float16_editor_on_the_emulated_gpu_equals_the_cpu(editor_folder: Path, caplog) -> None:
    """Maps cast the networks to float32 and back in place; so does the VAE for the image that overflows."""
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    results = []
    with emulated_gpu():
        for device, dtype in (("cpu", "float16"), ("cuda", "auto")):
            editor = load_editor(str(editor_folder), device, dtype)
            maps = next(relevance_maps(editor, images, "make the ball blue", seeds=[1, 2]))
            latents = editor.encode(images).latents * torch.tensor([1.0, 1e6], device=device).view(2, 1, 1, 1)
            decoded = editor.decode(latents)
            parameters = [*editor.unet.parameters(), *editor.vae.parameters()]
            assert all(isinstance(p, OnGpu) == (device == "cuda") and p.dtype == torch.float16 for p in parameters)
            results.append((maps.cpu(), decoded.cpu()))
    assert all(value.isfinite().all() and value.std() > 0 for value in results[0])
    assert caplog.text.count("overflows in float16") == 2
    assert all(map(torch.equal, *results))


SHORT = """
    --vis tensorboard --timestamp run --pipeline.reconstruct-steps 3 --pipeline.localize-steps 2 --pipeline.edit-steps 5
    --pipeline.edit-every 2 --pipeline.edit-count 2 --pipeline.diffusion-steps 3 --pipeline.editor-dtype float32
    --pipeline.model.num-nerf-samples-per-ray 4 --pipeline.datamanager.train-num-rays-per-batch 64
    --pipeline.datamanager.edit-num-rays-per-batch 64 --pipeline.model.camera-optimizer.mode SO3xR3
""".split()


def ns_train(monkeypatch: pytest.MonkeyPatch, scene: Path, editor: Path, output: Path, *arguments: object) -> Path:
    """Run wys-tiny for a few steps in this process.

    Args:
        monkeypatch: pytest's fixture.
        scene: Folder of the scene.
        editor: Folder of the editor.
        output: Folder of the runs.
        *arguments: Further options.

    Returns:
        Folder of the run.
    """
    monkeypatch.setattr(writer, "EVENT_WRITERS", [])  # writers of other tests, whose folders may not exist any more
    command = ["ns-train", "wys-tiny", "--data", scene, "--editor", editor, "--output-dir", output, *SHORT]
    command += ["--instruction", "make the ball blue", *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    train.entrypoint()
    writer.EVENT_WRITERS.clear()
    return output / "ring" / "wys-tiny" / "run"


@pytest.mark.slow
def test_a_step_neither_waits_for_the_gpu_nor_copies_to_it(ring_scene, editor_folder, tmp_path, monkeypatch) -> None:
    """This package's part of a step; steps with an edit, a line of the log or a checkpoint may wait. nerfstudio's own part does."""
    train_step, recorded = WysTrainer._train_step, {}

    def record(trainer: WysTrainer, step: int) -> None:
        with transfers.recorded("wys_nerfstudio", "nerfstudio") as places:
            train_step(trainer, step)
        recorded[step] = {place for place in places if place.startswith("wys_nerfstudio.")}

    monkeypatch.setattr(WysTrainer, "_train_step", record)
    options = ["--logging.steps-per-log", "100", "--machine.device-type", "cuda", "--mask-threshold", "0.3"]
    with emulated_gpu():
        ns_train(monkeypatch, ring_scene, editor_folder, tmp_path, *options)
    assert recorded[5], "a step with an edit"
    quiet = [1, 2, 4, 6, 8]
    assert {step: recorded[step] for step in quiet} == {step: set() for step in quiet}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--mask-threshold", "0.3"],
        ["--localization", "relevance-map", "--pipeline.datamanager.images-on-gpu", "False"],
        ["--localization", "none", "--pipeline.model.lpips-loss-mult", "1", "--pipeline.datamanager.edit-patch-size", "32",
         "--pipeline.datamanager.edit-num-rays-per-batch", "1024"],
    ],
    ids=["relevance field", "relevance maps, views in main memory", "no localization, LPIPS"],
)  # fmt: skip
def test_a_run_on_the_emulated_gpu_equals_the_cpu(
    options: list[str], ring_scene: Path, editor_folder: Path, torch_home: Path, tmp_path: Path, monkeypatch
) -> None:
    weights = []
    for device in ("cpu", "cuda"):
        arguments = ["--machine.device-type", device, *options]
        with emulated_gpu():
            run = ns_train(monkeypatch, ring_scene, editor_folder, tmp_path / device, *arguments)
        weights.append(read_checkpoint(find_checkpoint(run, "--load-dir"))["pipeline"])
        assert len(list((run / "wys" / "edits").glob("*.png"))) == 6
    on_cpu, on_gpu = weights
    assert on_gpu.pop(SETTINGS_KEY) == on_cpu.pop(SETTINGS_KEY)
    assert on_gpu.keys() == on_cpu.keys()
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], value, atol=0, rtol=0, msg=name)
    results = tmp_path / "results.json"
    arguments = ["ns-eval", "--load-config", str(run / "config.yml"), "--output-path", str(results)]
    monkeypatch.setattr(sys, "argv", arguments)
    with emulated_gpu():
        ns_eval.entrypoint()
    assert "edit_psnr" in json.loads(results.read_text())["results"]["edit"]["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["False", "True"])
def test_a_run_is_resumed_in_another_precision(
    mixed_precision: str, ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    other = "True" if mixed_precision == "False" else "False"
    shared = ["--machine.device-type", "cuda", "--mask-threshold", "0"]
    with emulated_gpu():
        first = ["--mixed-precision", mixed_precision, "--max-num-iterations", "7", *shared]
        stopped = ns_train(monkeypatch, ring_scene, editor_folder, tmp_path / "a", *first)
        assert bool(read_checkpoint(find_checkpoint(stopped, "--load-dir"))["scalers"]) == (mixed_precision == "True")
        second = ["--mixed-precision", other, "--load-dir", stopped, *shared]
        resumed = ns_train(monkeypatch, ring_scene, editor_folder, tmp_path / "b", *second)
    checkpoint = read_checkpoint(find_checkpoint(resumed, "--load-dir"))
    assert checkpoint["step"] == 9 and bool(checkpoint["scalers"]) == (other == "True")


@pytest.mark.slow
def test_half_precision_trains_the_scene(ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The precision of `wys` on a GPU. nerfstudio disables it on the CPU."""
    arguments = ["--machine.device-type", "cuda", "--mixed-precision", "True", "--mask-threshold", "0"]
    arguments += ["--pipeline.editor-dtype", "auto"]
    with emulated_gpu():
        run = ns_train(monkeypatch, ring_scene, editor_folder, tmp_path, *arguments)
    captured, edited = (
        read_checkpoint(path)["pipeline"]
        for path in (run / "wys" / "captured.ckpt", find_checkpoint(run, "--load-dir"))
    )
    del edited[SETTINGS_KEY]
    assert all(value.isfinite().all() for value in edited.values() if value.is_floating_point())
    changed = {name for name, value in edited.items() if not torch.equal(value, captured[name])}
    assert any("mlp_head" in name for name in changed) and any("mlp_base" in name for name in changed)
