"""The method on tiny-cuda-nn, whose place is taken by `fakes/tinycudann.py`: half-precision features, flat parameter vectors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAKES, sentence_of
from emulated_gpu import emulated_gpu
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.scripts import train
from scripts import ENVIRONMENT, TIMEOUT, run_script
from test_field import build as build_field
from test_field import samples
from test_model import VIEWS, batch, build, cameras, losses_of, parts_with_gradient, rays
from torch.amp.grad_scaler import GradScaler

from wys_nerfstudio.training.checkpoint import find_checkpoint, read_checkpoint, register_safe_globals
from wys_nerfstudio.training.run_state import SETTINGS_KEY
from wys_nerfstudio.training.schedule import Phase

register_safe_globals()
TESTS = Path(__file__).parent
TCNN: dict[str, Any] = {"implementation": "tcnn", "hidden_dim": 16, "hidden_dim_color": 16}
PROPOSALS = [
    {"hidden_dim": 16, "log2_hashmap_size": 8, "num_levels": 2, "max_res": size, "use_linear": linear}
    for size, linear in ((16, False), (32, True))
]
"""A network and a single linear layer: nerfstudio builds the latter with torch."""


def build_model(phase: Phase = Phase.EDIT, **changes: Any):
    return build(phase, **{**TCNN, "proposal_net_args_list": PROPOSALS, **changes})


# ---------------------------------------------------------------------------------------------------- field and model


def test_half_precision_stays_within_backbone_and_radiance_head(tcnn):
    field, positions = build_field(**TCNN), samples()
    assert isinstance(field.mlp_base.model, tcnn.NetworkWithInputEncoding)
    assert isinstance(field.mlp_head.tcnn_encoding, tcnn.Network)
    density, features = field.get_density(positions)
    rgb = field.get_outputs(positions, features)[FieldHeadNames.RGB]
    relevance = field.get_relevance(positions, features)
    assert features.dtype == torch.float16
    assert density.dtype == rgb.dtype == relevance.dtype == torch.float32
    assert bool((density > 0).any()) and 0 < relevance.min() <= relevance.max() < 1


@pytest.mark.parametrize("relevance_input", ["geometry", "geometry+position"])
@pytest.mark.parametrize("phase", [Phase.LOCALIZE, Phase.EDIT])
def test_the_relevance_loss_reaches_no_flat_parameter_vector(phase, relevance_input, tcnn):
    model = build_model(phase, relevance_input=relevance_input).train()
    losses_of(model, batch())["relevance_loss"].backward()
    assert parts_with_gradient(model) == {"field.mlp_relevance"}
    assert model.field.mlp_base.model.params.grad is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("phase", [Phase.RECONSTRUCT, Phase.EDIT])
def test_the_losses_train_all_flat_parameter_vectors(phase, device, tcnn):
    """On the emulated GPU as the trainer does: with autocast and a gradient scaler."""
    with emulated_gpu() if device == "cuda" else nullcontext():
        model = build_model(phase).to(device).train()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.numel()], lr=0.01)
        scaler = GradScaler(device, init_scale=128.0, enabled=device == "cuda")
        with torch.autocast(device, enabled=device == "cuda"):
            data = {name: value.to(device) for name, value in batch().items()}
            outputs = model(rays().to(device))
            losses = model.get_loss_dict(outputs, data, model.get_metrics_dict(outputs, data))
            loss = sum(losses.values())
        assert loss.dtype == torch.float32 and outputs["rgb"].dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        changed = {name for name, value in model.named_parameters() if bool((value != before[name]).any())}
    assert {
        "field.mlp_base.model.params",
        "field.mlp_head.tcnn_encoding.params",
        "proposal_networks.0.mlp_base.1.tcnn_encoding.params",
        "proposal_networks.0.encoding.tcnn_encoding.params",
        "proposal_networks.1.encoding.tcnn_encoding.params",
        "proposal_networks.1.linear.weight",
    } <= changed
    assert all(bool(value.isfinite().all()) for value in model.parameters())


def test_views_are_rendered_and_the_hull_is_built(tcnn):
    model = build_model()
    maps = torch.rand(VIEWS, 12, 16, generator=torch.Generator().manual_seed(3))
    model.build_visual_hull(cameras(), maps, maps, torch.full((VIEWS, 3, 4), 0.5))
    assert model.field.relevance_hull.known
    for name, value in model.render_view(cameras(), 1).items():
        assert value.dtype == torch.float32 and bool(value.isfinite().all()), name


def test_the_hash_grid_as_relevance_input_is_refused(tcnn, ring_scene, tmp_path, monkeypatch):
    arguments = ["--data", ring_scene, "--output-dir", tmp_path / "out", "--instruction", "make the ball blue"]
    arguments += ["--machine.device-type", "cpu", "--pipeline.model.relevance-input", "hashgrid"]
    monkeypatch.setattr(sys, "argv", ["ns-train", "wys", *map(str, arguments)])
    message = sentence_of(train.entrypoint)
    assert "--pipeline.model.relevance-input hashgrid is not available with tiny-cuda-nn: add" in message
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- whole runs

RUNNER = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
from emulated_gpu import emulated_gpu
from nerfstudio.scripts import train  # imports nerfstudio in an order that works
from nerfstudio.utils import writer

endings = []
for module, *arguments in json.loads(sys.argv[2]):
    script = importlib.import_module(f"nerfstudio.scripts.{module}")
    sys.argv = [module, *arguments]
    writer.EVENT_WRITERS.clear()
    try:
        with emulated_gpu():
            script.entrypoint()
        endings.append(None)
    except SystemExit as error:
        endings.append(error.code)
print(json.dumps(endings))
"""
FIELD = ["--vis=tensorboard", "--timestamp=run", "--pipeline.model.log2-hashmap-size=10",
         "--pipeline.model.num-nerf-samples-per-ray=4", "--pipeline.datamanager.train-num-rays-per-batch=64",
         "--pipeline.datamanager.eval-num-rays-per-batch=64", "--pipeline.model.num-proposal-samples-per-ray", "8", "8"]  # fmt: skip
EDIT = ["--instruction=make the ball blue", "--mask-threshold=0", "--pipeline.reconstruct-steps=3", "--pipeline.clip-model=None",
        "--pipeline.localize-steps=2", "--pipeline.edit-steps=5", "--pipeline.edit-every=2", "--pipeline.diffusion-steps=2",
        "--pipeline.editor-dtype=float32", "--pipeline.model.lpips-loss-mult=0",
        "--pipeline.datamanager.edit-num-rays-per-batch=64"]  # fmt: skip


class Commands:
    """Command lines of the runs, each in an output folder of its own."""

    def __init__(self, folder: Path, scene: Path, editor: Path) -> None:
        self.folder, self._scene, self._editor = folder, scene, editor

    def train(self, name: str, *arguments: object, method: str = "wys", device: str = "cuda") -> list[str]:
        """Return a command line of ns-train."""
        fixed = [f"--data={self._scene}", f"--output-dir={self.folder / name}", f"--machine.device-type={device}"]
        edit = [] if method == "nerfacto" else ["--editor", str(self._editor), *EDIT]
        return ["train", method, *fixed, *FIELD, *edit, *map(str, arguments)]

    def run(self, name: str, method: str = "wys") -> Path:
        """Return the folder of a run."""
        return self.folder / name / "ring" / method / "run"

    def weights(self, name: str) -> dict[str, Any]:
        """Return the weights of a finished run, without the settings beside them."""
        weights = read_checkpoint(find_checkpoint(self.run(name), "--load-dir"))["pipeline"]
        return {key: value for key, value in weights.items() if key != SETTINGS_KEY}


@pytest.fixture(scope="module")
def finished(ring_scene: Path, editor_folder: Path, torch_home: Path, tmp_path_factory) -> Iterator[Any]:
    """Runs on an emulated GPU with tiny-cuda-nn, in one process."""
    commands = Commands(tmp_path_factory.mktemp("tcnn"), ring_scene, editor_folder)
    short = ["--max-num-iterations=3", "--steps-per-save=2"]
    lines = {
        "stopped": commands.train("stopped", "--max-num-iterations=8"),
        "resumed": commands.train("resumed", "--load-dir", commands.run("stopped")),
        "base": commands.train("base", *short, method="nerfacto", device="cpu"),
        "based": commands.train("based", "--base-run", commands.run("base", "nerfacto")),
        "torch": commands.train("torch", *short, "--pipeline.model.implementation=torch", method="nerfacto", device="cpu"),
        "torch base": commands.train("refused", "--base-run", commands.run("torch", "nerfacto")),
        "resumed in torch": commands.train("refused", "--load-dir", commands.run("stopped"), "--pipeline.model.implementation=torch"),
        "eval": ["eval", f"--load-config={commands.run('resumed') / 'config.yml'}", f"--output-path={commands.folder / 'eval.json'}"],
        "render": ["render", "dataset", f"--load-config={commands.run('resumed') / 'config.yml'}", "--split=test",
                   f"--output-path={commands.folder / 'renders'}", "--rendered-output-names", "rgb", "relevance", "edit_mask"],
    }  # fmt: skip
    environment = {
        **ENVIRONMENT,
        "TORCH_HOME": str(torch_home),
        "PYTHONPATH": f"{FAKES}:{TESTS.parent}",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-W", "ignore", "-c", RUNNER, str(TESTS), json.dumps(list(lines.values()))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    yield commands, dict(zip(lines, json.loads(done.stdout.splitlines()[-1])))


@pytest.mark.slow
def test_all_phases_resume_and_base_run(finished):
    commands, endings = finished
    assert [endings[name] for name in ("stopped", "resumed", "base", "based", "torch", "eval", "render")] == [None] * 7
    for name in ("resumed", "based"):
        assert len(list((commands.run(name) / "wys" / "edits").glob("*.png"))) == 3
        weights = commands.weights(name)
        captured = read_checkpoint(commands.run(name) / "wys" / "captured.ckpt")["pipeline"]
        assert all(bool(value.isfinite().all()) for value in weights.values())
        changed = {key for key, value in weights.items() if not torch.equal(value, captured[key])}
        assert {"_model.field.mlp_base.model.params", "_model.field.mlp_head.tcnn_encoding.params"} <= changed
    metrics = json.loads((commands.folder / "eval.json").read_text())["results"]
    assert metrics["psnr"] > 0 and metrics["edit"]["mean"]["edit_psnr"] > 0
    assert len(list((commands.folder / "renders").rglob("*.jpg"))) >= 3


@pytest.mark.slow
def test_weights_of_the_other_backend_are_refused(finished):
    _, endings = finished
    assert endings["torch base"].endswith(
        "was trained without tiny-cuda-nn: add --pipeline.model.implementation torch."
    )
    assert "was trained with tiny-cuda-nn, whose weights only" in endings["resumed in torch"]


@pytest.mark.slow
def test_runs_are_refused_where_tiny_cuda_nn_is_missing(finished):
    commands, _ = finished
    base, stopped = commands.run("base", "nerfacto"), commands.run("stopped")
    for line in (
        commands.train("missing", "--base-run", base, device="cpu"),
        commands.train("missing", "--load-dir", stopped, device="cpu"),
        ["eval", f"--load-config={commands.run('resumed') / 'config.yml'}"],
    ):
        done = run_script(line[0], line[1:])
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert "with tiny-cuda-nn, whose weights only tiny-cuda-nn can read. Install it" in done.stderr
