"""Contents of the wheel and of the source distribution."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import wys_nerfstudio

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "wys_nerfstudio"


def shipped() -> set[str]:
    """Return the package's files, data included, without the training code of the embedded networks and the demo's README, whose
    links lead into the repository."""
    training = PACKAGE / "demo" / "training"
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = [path for path in files if training not in path.parents and path != PACKAGE / "demo" / "README.md"]
    return {path.relative_to(ROOT).as_posix() for path in files}


def build(folder: Path) -> Path:
    """Build wheel and source distribution, in a copy because building leaves files behind.

    Args:
        folder: Folder of the copy.

    Returns:
        Folder of both.
    """
    shutil.copytree(PACKAGE, folder / "wys_nerfstudio", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    code = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"
    (folder / "out").mkdir()
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return folder / "out"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and source distribution."""
    return build(tmp_path_factory.mktemp("release"))


def test_the_wheel_holds_only_the_package_and_its_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == shipped()
    assert {"entry_points.txt", "LICENSE"} <= {Path(name).name for name in metadata}


def test_the_source_distribution_suffices_to_build_the_wheel(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert shipped() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_version_is_defined_in_one_place(built: Path) -> None:
    version = wys_nerfstudio.__version__
    assert {path.name.split("-")[1].removesuffix(".tar.gz") for path in built.iterdir()} == {version}
    assert importlib.metadata.version("wys-nerfstudio") == version
    assert version not in (ROOT / "pyproject.toml").read_text("utf8").split("dependencies")[0]
