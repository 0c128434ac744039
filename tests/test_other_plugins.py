"""The wheel in an environment that has another plugin, which is laid out as Instruct-NeRF2NeRF is: neither disturbs the other."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import nerfstudio
import pytest
from scripts import TIMEOUT
from test_release import build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_home")]

PLUGIN = {
    "pyproject.toml": """
[project]
name = "in2n"
version = "0.1.0"
[project.entry-points."nerfstudio.method_configs"]
in2n = "in2n.in2n_config:in2n_method"
[tool.setuptools]
packages = ["in2n"]
""",
    "in2n/__init__.py": "",
    "in2n/in2n_pipeline.py": """
from dataclasses import dataclass, field
from typing import Type
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig

@dataclass
class InstructNeRF2NeRFPipelineConfig(VanillaPipelineConfig):
    _target: Type = field(default_factory=lambda: InstructNeRF2NeRFPipeline)
    prompt: str = "don't change the image"
    guidance_scale: float = 7.5
    edit_rate: int = 10

class InstructNeRF2NeRFPipeline(VanillaPipeline):
    pass
""",
    "in2n/in2n_config.py": """
from dataclasses import replace
from nerfstudio.configs.method_configs import method_configs
from nerfstudio.plugins.types import MethodSpecification
from in2n.in2n_pipeline import InstructNeRF2NeRFPipelineConfig

nerfacto = method_configs["nerfacto"]
in2n_method = MethodSpecification(
    config=replace(
        nerfacto,
        method_name="in2n",
        pipeline=InstructNeRF2NeRFPipelineConfig(
            datamanager=nerfacto.pipeline.datamanager, model=nerfacto.pipeline.model
        ),
    ),
    description="Instruct-NeRF2NeRF",
)
""",
}
"""Files of a package that registers a method as Instruct-NeRF2NeRF does."""


class Environment:
    """A virtual environment with a copy of nerfstudio, to which its completions are written; everything else is shared.

    Args:
        folder: Folder of the environment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        package = Path(nerfstudio.__file__).parent
        shutil.copytree(package, site / "nerfstudio", ignore=shutil.ignore_patterns("__pycache__", "bash", "zsh"))
        metadata = distribution("nerfstudio")
        shutil.copytree(str(metadata._path), site / Path(str(metadata._path)).name)  # type: ignore
        # Of a folder that is added by a .pth file, the .pth files are not read: this repository is not on the path.
        (site / "shared.pth").write_text(str(package.parent))
        for script in metadata.entry_points.select(group="console_scripts"):
            file = folder / "bin" / script.name
            call = f"if __name__ == '__main__':\n    {script.attr}()\n"  # nerfacto's data manager starts processes
            file.write_text(f"#!{self.python}\nfrom {script.module} import {script.attr}\n{call}")
            file.chmod(0o755)
        self.completions = site / "nerfstudio" / "scripts" / "completions"

    def install(self, package: Path) -> None:
        """Install a package with pip."""
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", *options, package]
        subprocess.run(command, check=True, env=self._variables())

    def run(self, program: str, *arguments: object) -> str:
        """Run a program of the environment and return its output."""
        command = [self.folder / "bin" / program, *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._variables(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def _variables(self) -> dict[str, str]:
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CONDA_PREFIX")}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**variables, "HOME": str(self.folder), "PATH": path, "COLUMNS": "200", "MPLCONFIGDIR": str(self.folder)}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that has the other plugin first and then this package's wheel."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, content in PLUGIN.items():
        (folder / "in2n" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in2n" / name).write_text(content)
    environment = Environment(folder / "venv")
    environment.install(folder / "in2n")
    (wheel,) = build(folder / "release").glob("*.whl")
    environment.install(wheel)
    return environment


def test_both_plugins_methods_are_listed(environment: Environment) -> None:
    listed = environment.run("ns-train", "--help")
    for method in ("in2n", "wys", "wys-small", "wys-tiny", "nerfacto"):
        assert f" {method} " in listed
    code = "import in2n, wys_nerfstudio; print(in2n.__file__, wys_nerfstudio.__file__)"
    assert all(path.startswith(str(environment.folder)) for path in environment.run("python", "-c", code).split())


def test_both_plugins_train(environment: Environment, ring_scene: Path) -> None:
    common = ["--data", ring_scene, "--vis", "tensorboard", "--machine.device-type", "cpu"]
    common += [
        "--pipeline.datamanager.train-num-rays-per-batch",
        "64",
        "--pipeline.model.num-nerf-samples-per-ray",
        "4",
    ]
    small = ["--pipeline.model.implementation", "torch", "--pipeline.model.log2-hashmap-size", "10"]
    environment.run(
        "ns-train", "in2n", *common, *small, "--max-num-iterations", "2", "--pipeline.prompt", "make it red"
    )
    steps = ["--pipeline.reconstruct-steps", "2", "--pipeline.localize-steps", "1", "--pipeline.edit-steps", "2"]
    steps += ["--pipeline.datamanager.edit-num-rays-per-batch", "1024"]
    environment.run("ns-train", "wys-tiny", *common, *steps, "--instruction", "turn the bear into a panda")
    runs = {path.parent.parent.name for path in environment.folder.glob("outputs/ring/*/*/config.yml")}
    assert runs == {"in2n", "wys-tiny"}
    assert len(list(environment.folder.glob("outputs/ring/*/*/nerfstudio_models/*.ckpt"))) == 2


def test_tab_completion_knows_both_plugins(environment: Environment) -> None:
    (environment.folder / ".bashrc").touch()
    environment.run("ns-install-cli")
    completion = (environment.completions / "bash" / "_ns-train").read_text()
    assert "'wys-tiny'" in completion and "'in2n'" in completion
    assert "setup.bash" in (environment.folder / ".bashrc").read_text()
