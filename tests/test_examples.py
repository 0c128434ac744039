"""The scripts of .github/examples run as their comments say, with the embedded editor."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_home")]

TURNTABLE = ROOT / ".github" / "examples" / "turntable.sh"
SHORT = """
    wys-tiny --vis tensorboard --machine.device-type cpu --pipeline.reconstruct-steps 20 --pipeline.localize-steps 5
    --pipeline.edit-steps 10 --pipeline.datamanager.train-num-rays-per-batch 128
    --pipeline.datamanager.edit-num-rays-per-batch 1024 --pipeline.model.num-nerf-samples-per-ray 8
""".split()
PROCESS_DATA = f"""#!{sys.executable}
import shutil, sys
from pathlib import Path
import tyro
from nerfstudio.process_data.images_to_nerfstudio_dataset import ImagesToNerfstudioDataset
from nerfstudio.scripts.process_data import Commands
command = tyro.cli(Commands)
assert isinstance(command, ImagesToNerfstudioDataset)
shutil.copytree(command.data.parent, command.output_dir, dirs_exist_ok=True)
"""
"""Takes the place of ns-process-data, which needs COLMAP: copies the scene that the photographs belong to."""


def run(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the script in a folder; programs in its `bin` come first."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", TURNTABLE, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ns-render requires ffmpeg for paths")
@pytest.mark.parametrize("data", ["scene", "scene/images"])
def test_photographs_become_a_turntable_of_the_edited_scene(data: str, ring_scene: Path, tmp_path: Path) -> None:
    shutil.copytree(ring_scene, tmp_path / "scene")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ns-process-data").write_text(PROCESS_DATA)
    (tmp_path / "bin" / "ns-process-data").chmod(0o755)
    done = run(tmp_path, data, "turn the bear into a panda", "out", *SHORT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "out" / "turntable.mp4").stat().st_size > 1000
    assert list((tmp_path / "out" / "run" / "wys-tiny" / "edited" / "wys" / "edits").glob("*.png"))
    assert (tmp_path / "out" / "scene").exists() == (data == "scene/images")


def test_missing_arguments_end_with_the_usage(tmp_path: Path) -> None:
    done = run(tmp_path, "photos", "turn the bear into a panda")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: bash turntable.sh PHOTOS INSTRUCTION OUT [METHOD [OPTION ...]]\n"
