"""Import directions between the rooms of the package, and the heavy packages that importing a room must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wys_nerfstudio

PACKAGE = Path(wys_nerfstudio.__file__).parent
DIFFUSION = ("diffusers", "transformers")

ROOMS = [
    {"cli"},
    {"demo"},
    {"config"},
    {"trainer"},
    {"pipeline"},
    {"export"},
    {"viewer", "datamanager", "model"},
    {"training", "field"},
    {"evaluation"},
    {"editing"},
    {"relevance"},
    {"utils"},
]
"""Levels from top to bottom. A module imports from its own room and from lower levels, never from another room of its level."""

CONTRACT_FILES = {"config", "trainer", "pipeline", "datamanager", "model", "field"}
"""The modules at the package's top level, under nerfstudio's names."""

STEPS = {
    "relevance": "wys_nerfstudio.relevance",
    "editing": "wys_nerfstudio.editing",
    "evaluation": "wys_nerfstudio.evaluation.lpips, wys_nerfstudio.evaluation.metrics, wys_nerfstudio.evaluation.clip",
    "config": "wys_nerfstudio.config",
}
"""Imports of one fresh process, in this order."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Top-level packages in memory after each step."""
    report = "print(*{name.split('.')[0] for name in sys.modules})"
    code = "import sys\n" + "".join(f"import {names}\n{report}\n" for names in STEPS.values())
    # The viewer of other methods stays as it is.
    code += "import viser.infra\nassert viser.infra.WebsockServer is viser.infra._infra.WebsockServer\n"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()[-len(STEPS) :]
    return dict(zip(STEPS, (set(line.split()) for line in lines), strict=True))


def modules() -> dict[str, Path]:
    """Return the names of the package's modules, relative to it, and their files."""
    names = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


def imported(path: Path) -> set[str]:
    """Return the names of this package's modules that a file imports, at the top or inside functions."""
    tree = ast.parse(path.read_text("utf8"))
    known = modules()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name.removeprefix("wys_nerfstudio.") in known else str(node.module))
    return {name.removeprefix("wys_nerfstudio.") for name in found if name.startswith("wys_nerfstudio.")}


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def level(module: str) -> int:
    return next(i for i, rooms in enumerate(ROOMS) if room(module) in rooms)


def third_party(path: Path, top_level_only: bool = False) -> set[str]:
    """Return the top-level packages that a file imports."""
    tree = ast.parse(path.read_text("utf8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_only_the_contract_files_are_outside_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *CONTRACT_FILES}
    assert {room(name) for name in modules()} == set.union(*ROOMS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str):
    for other in imported(modules()[name]):
        assert room(other) == room(name) or level(other) > level(name), f"{name} imports {other}"


def test_there_is_no_import_cycle():
    graph = {name: imported(path) & set(modules()) - {name} for name, path in modules().items()}
    visited: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in visited:
            for other in graph[name]:
                visit(other, (*path, name))
            visited.add(name)

    for name in graph:
        visit(name, ())
    assert visited == set(modules())


def test_relevance_maps_need_torch_only(loaded):
    assert "torch" in loaded["relevance"]
    assert not loaded["relevance"] & {"nerfstudio", *DIFFUSION}


def test_editing_loads_no_nerfstudio_nor_diffusers_at_import(loaded):
    assert not loaded["editing"] & {"nerfstudio", *DIFFUSION}
    assert not loaded["evaluation"] & {"nerfstudio", *DIFFUSION}


def test_config_loads_no_diffusers(loaded):
    assert "nerfstudio" in loaded["config"]
    assert not loaded["config"] & set(DIFFUSION)


@pytest.mark.parametrize("name", sorted(modules()))
def test_only_the_editing_room_imports_diffusers(name: str):
    packages = third_party(modules()[name])
    if "diffusers" in packages:
        assert name.startswith(("editing", "demo.training")), name
    if "transformers" in packages:
        assert name.startswith(
            ("editing", "demo.training", "evaluation.clip", "relevance.text_segmenter", "utils.log_filters")
        ), name
    if room(name) == "editing":
        assert "nerfstudio" not in packages, name


@pytest.mark.parametrize("name", sorted(name for name in modules() if not name.startswith("demo.training")))
def test_heavy_imports_are_inside_functions(name: str):
    assert not third_party(modules()[name], top_level_only=True) & {*DIFFUSION, "safetensors"}, name
