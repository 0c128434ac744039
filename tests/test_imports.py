"""What importing a module must not load, and that imports point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wys_nerfstudio

PACKAGE = Path(wys_nerfstudio.__file__).parent
DIFFUSION = ("diffusers", "transformers")

# Rooms from top to bottom; a module imports from rooms below its own, or from its own package's lower ones.
ROOMS = [
    {"cli"},
    {"config", "compare", "sweep"},
    {"trainer"},
    {"steering"},
    {"pipeline"},
    {"edit_loop", "evaluation", "beginnings"},
    {"options", "run_folder", "devices"},
    {"sweep_figures"},
    {
        "controls",
        "datamanager",
        "model",
        "checkpoint",
        "history",
        "run_state",
        "image_edits",
        "sweep_files",
    },
    {
        "field",
        "hull",
        "editing",
        "perceptual",
        "metrics",
        "niqe",
        "clip",
        "pictures",
        "image_files",
        "truth",
        "capture",
        "recipe",
        "endings",
        "relevance_files",
        "warm_up",
    },
    {"relevance", "schedule", "encodings", "quiet"},
    {"files"},
    {"ranks"},
    {"errors"},
]


STEPS = {
    "schedule": "wys_nerfstudio.schedule",
    "relevance": "wys_nerfstudio.relevance",
    "editing": "wys_nerfstudio.editing.loading",
    "pictures": "wys_nerfstudio.perceptual, wys_nerfstudio.pictures, wys_nerfstudio.metrics, wys_nerfstudio.clip",
    "config": "wys_nerfstudio.config",
}
"""What one fresh process imports, in this order."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Top-level packages that have been loaded after each step."""
    show = "print(*{name.split('.')[0] for name in sys.modules})"
    code = "import sys\n" + "".join(f"import {names}\n{show}\n" for names in STEPS.values())
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(STEPS, (set(line.split()) for line in done.stdout.splitlines()[-len(STEPS) :]), strict=True))


def modules() -> dict[str, Path]:
    """Module names below the package, and their files; the demo is a world of its own."""
    names = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name.split(".")[0] != "demo"}


def imported(path: Path) -> set[str]:
    """Dotted names of our own modules that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text("utf8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            known = modules()
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole.removeprefix("wys_nerfstudio.") in known else str(node.module))
    return {name.removeprefix("wys_nerfstudio.") for name in found if name.startswith("wys_nerfstudio.")}


def room_of(module: str) -> int:
    return next(i for i, room in enumerate(ROOMS) if module.split(".", maxsplit=1)[0] in room)


def test_the_schedule_is_python_alone_and_the_mathematics_torch_alone(loaded):
    assert not loaded["schedule"] & {"torch", "numpy", "nerfstudio", *DIFFUSION}
    assert "torch" in loaded["relevance"]
    assert not loaded["relevance"] & {"nerfstudio", *DIFFUSION}


def test_the_editing_side_loads_no_nerfstudio_and_diffusers_only_on_demand(loaded):
    assert not loaded["editing"] & {"nerfstudio", *DIFFUSION}


def test_pictures_and_the_perceptual_loss_need_no_nerfstudio(loaded):
    assert not loaded["pictures"] & {"nerfstudio", *DIFFUSION}


def test_the_configuration_that_every_nerfstudio_command_imports_loads_no_diffusion(loaded):
    assert "nerfstudio" in loaded["config"]
    assert not loaded["config"] & set(DIFFUSION)


def test_only_the_editing_side_and_clip_name_diffusers_and_transformers():
    for name, path in modules().items():
        tree = ast.parse(path.read_text("utf8"))
        named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if {full.split(".")[0] for full in named} & set(DIFFUSION):
            assert name.split(".")[0] in ("editing", "clip", "quiet"), name
        if name.split(".")[0] == "editing":
            assert "nerfstudio" not in {full.split(".")[0] for full in named}, name


@pytest.mark.parametrize("name", sorted(set(modules()) - {"__init__", "__main__"}))
def test_imports_point_down(name):
    for other in imported(modules()[name]) - {name}:
        if other == "demo" or other.startswith("demo."):
            assert name == "cli", f"{name} imports {other}"
            continue
        same_package = other.split(".")[0] == name.split(".")[0]
        assert same_package or room_of(other) >= room_of(name), f"{name} imports {other}, which is above it"


def test_there_is_no_cycle():
    graph = {name: imported(path) & set(modules()) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(modules())


def test_heavy_imports_are_not_at_the_top_of_a_module():
    for name, path in modules().items():
        for node in ast.parse(path.read_text("utf8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {full.split(".")[0] for full in names} & {*DIFFUSION, "safetensors"}, name
