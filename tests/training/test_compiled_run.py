"""`ns-train --pipeline.compile-editor`: the same edits, exact resuming, and a missing compiler refused before the first step."""

from pathlib import Path

import pytest
import torch
from conftest import write_ring_scene
from test_interrupts import TrainCommand, assert_equal_weights, interrupt
from test_pipeline import build_trainer, small_config
from torch._inductor import config as inductor_config

from wys_nerfstudio import pipeline
from wys_nerfstudio.utils.visualization import read_png

COMPILED = "--pipeline.compile-editor=True"
EVERYWHERE = "--mask-threshold=0"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ring_scene(tmp_path_factory.mktemp("compiled") / "scene", width=20, height=16, views=4)


@pytest.fixture
def commands(scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch) -> list[TrainCommand]:
    """Commands of three runs."""
    return [
        TrainCommand(scene, editor_folder, tmp_path / name, monkeypatch) for name in ("plain", "compiled", "resumed")
    ]


def test_a_missing_compiler_ends_the_run_before_its_first_step(commands, tmp_path: Path, monkeypatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        sentence = str(commands[0](COMPILED))
    assert (
        "The editor cannot be compiled on this machine" in sentence
        and "leave out --pipeline.compile-editor" in sentence
    )
    assert not list(commands[0].run.rglob("*.ckpt"))


@pytest.mark.parametrize("overlap", [False, True])
def test_cuda_graphs_are_used_in_the_main_thread_only(
    scene, editor_folder, tmp_path, monkeypatch, overlap: bool
) -> None:
    requests: list[bool] = []
    monkeypatch.setattr(pipeline, "has_own_device", lambda *_: overlap)
    monkeypatch.setattr(pipeline, "check_compiler", lambda _: None)
    monkeypatch.setattr(pipeline, "compile_editor", lambda _, cuda_graphs: requests.append(cuda_graphs))
    trainer = build_trainer(small_config(scene, editor_folder, tmp_path, compile_editor=True))
    trainer.pipeline.release_editor()
    trainer.pipeline.editor()
    assert requests == [not overlap] * 2, "also when the editor is loaded again"


@pytest.mark.slow
def test_edits_of_a_compiled_editor_and_exact_resuming(commands: list[TrainCommand], capsys) -> None:
    plain, compiled, resumed = commands
    assert plain(EVERYWHERE) is None and "compiles the editor" not in capsys.readouterr().out
    assert compiled(EVERYWHERE, COMPILED) is None
    assert capsys.readouterr().out.count("The first edit compiles the editor, which can take minutes.") == 1
    folders = [command.run / "wys" for command in (plain, compiled)]
    files = [file.name for file in sorted((folders[0] / "edits").glob("*.png"))]
    assert len(files) == 3
    for file in files:
        edited, expected = (read_png(folder / "edits" / file) for folder in folders)
        torch.testing.assert_close(edited, expected, rtol=0, atol=1.5 / 255)  # of 8 bits
    maps = [(folder / "relevance" / "maps.safetensors").read_bytes() for folder in folders]
    assert maps[0] == maps[1]

    assert resumed(EVERYWHERE, COMPILED, step=7, action=interrupt) == 130
    torch._dynamo.reset()  # as a new process, which compiles again
    assert resumed(EVERYWHERE, COMPILED, "--load-dir", resumed.run) is None
    assert_equal_weights(resumed.weights(), compiled.weights())
