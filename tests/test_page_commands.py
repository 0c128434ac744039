"""The commands of all pages run as they are printed, with fewer steps, in a folder that has the files that they name.

As a program this module runs them one after the other in one process, through the entry points of their console scripts. The
hub's editor and CLIP are small ones in the hub's own cache. test_pages.py checks that every command parses.

    python tests/test_page_commands.py FOLDER
"""

import csv
import os
import shlex
import shutil
import subprocess
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from pages import PAGES, ROOT, commands
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_home")]

ELSEWHERE = {
    "pip install .": (".ci/run", "pip wheel"),
    'pip install -e ".[dev]"': (".ci/run", "install_part"),
    "pip install wys-nerfstudio": ("tests/test_release.py", 'metadata.version("wys-nerfstudio")'),
    "pytest": (".ci/run", "test_command"),
    "pytest -m slow": (".ci/run", "pytest -m slow"),
    "bash .ci/run": (".ci/run", "set -euo"),
    "ns-process-data": ("tests/test_entry_points_of_data.py", 'command("process_data"'),
    "ns-install-cli": (
        "tests/test_pages.py",
        '"ns-install-cli"',
    ),  # nerfstudio's; it writes to the user's shell settings
    "ns-train -h": ("tests/cli/test_cli.py", '"wys", "--help"'),
    "ns-train --help": ("tests/test_benchmarks.py", "startup.main"),
    "ns-train wys --help": ("tests/cli/test_cli.py", '"wys", "--help"'),
    'ns-train wys --data s --instruction "..." colmap': (
        "tests/test_entry_points_of_data.py",
        '("colmap", as_colmap_scene)',
    ),
    "ns-train nerfacto --help": ("tests/test_benchmarks.py", "startup.main"),
    "ns-viewer": ("tests/test_entry_points.py", "viewer.run_viewer"),
    "wys compare": ("tests/test_entry_points.py", '"compare", finished_run'),
    "wys export": ("tests/cli/test_export.py", '"export", edited_run'),
    "ns-train nerfacto --data edited/": ("tests/cli/test_export.py", 'train("nerfacto", exported'),
    # It needs a GPU; what it reads is tested.
    "ns-train splatfacto --data edited/": ("tests/cli/test_export.py", "load_3D_points=True"),
    "wys ablate": ("tests/demo/test_ablations.py", '"ablate"'),
    "python -m wys_nerfstudio.demo.sds_sheet": ("tests/demo/test_sds_sheet.py", "sds_sheet.main"),
    **{
        f"python tests/benchmarks/{name}.py": ("tests/test_benchmarks.py", f"{name}.main(")
        for name in "compat edit_phase families field flops full_size localization memory photographs region sampler scale schedule shortcuts speed startup views".split()
    },
    "python tests/page_tables.py": ("tests/test_pages.py", "with_tables(PAGES[page])"),
    "python tests/benchmarks/kills.py": ("tests/training/test_interrupts.py", '"kills.py"'),
    "python tests/benchmarks/soak.py": ("tests/test_soak.py", "= soak("),
    # These take an hour; tests run their parts.
    "python -m wys_nerfstudio.demo.training.train_clip": ("tests/demo/test_clip_folder.py", "train_clip.train("),
    "python -m wys_nerfstudio.demo.training.train_editor": (
        "tests/demo/test_editor_folder.py",
        "train_editor.Trainer(",
    ),
    "python -m wys_nerfstudio.demo.training.train_flow_editor": (
        "tests/demo/test_flow_editor_training.py",
        "FlowTrainer(",
    ),
    "python -m wys_nerfstudio.demo.training.evaluate_editor": ("tests/test_pages.py", "write_card("),
}
"""Commands that are run elsewhere: how they begin or what they contain, a test file, and a word in it."""

SHORT = """
    --mask-threshold 0.2 --pipeline.reconstruct-steps 3 --pipeline.localize-steps 2 --pipeline.edit-steps 3
    --pipeline.edit-every 2 --pipeline.diffusion-steps 2 --pipeline.relevance-num-samples 1
    --pipeline.datamanager.train-num-rays-per-batch 64 --pipeline.datamanager.edit-num-rays-per-batch 1024
    --pipeline.model.num-nerf-samples-per-ray 4
    --pipeline.model.log2-hashmap-size 10
""".split()
QUIET = ["--vis", "tensorboard", "--machine.device-type", "cpu"]
BASE = f"""
    ns-train nerfacto --data scene/ --timestamp 2025-01-01_120000 --max-num-iterations 2 {" ".join(QUIET)}
    --pipeline.datamanager.train-num-rays-per-batch 64 --pipeline.model.log2-hashmap-size 10
    --pipeline.model.implementation torch --pipeline.model.num-nerf-samples-per-ray 4
    --pipeline.model.num-proposal-samples-per-ray 8 8
"""
SHORTER = {
    "ns-train": [*QUIET, *SHORT],
    "ns-render interpolate": ["--interpolation-steps", "2", "--pose-source", "train"],
    "ns-export pointcloud": ["--num-points", "300", "--num-rays-per-batch", "256"],
    "wys demo ": ["--recipe", "short.yaml"],
    "wys demo-pictures": ["--count", "1"],
    "wys edit-image": ["--diffusion-steps", "2"],
    "wys sweep": ["--diffusion-steps", "2", "--relevance-num-samples", "1"],
}
"""Arguments that are added to commands, by how these begin."""
LEFT = """
    wys-demo/contact_sheet.png wys-demo/turntable.mp4 wys-demo/metrics.json
    outputs/scene/wys/DATE/wys/contact_sheet.png outputs/bear/wys/*/wys/contact_sheet.png
    panda.png panda_relevance.png panda_mask.png panda_side_by_side.png snowed/frame_000.png try.png
    masks/frame_000.png masks/contact_sheet.png sweep/sweep.csv sweep/curves.png toy/list.csv toy-edited/*.png toy-sweep/sweep.csv toy-sweep/curves.png
    check.json eval.json exports/point_cloud.ply my-scene/transforms.json DIR/contact_sheet.png
    outputs/toy-scene/wys-tiny/*/config.yml outputs/SCENE/wys-tiny/*/config.yml
""".split()
"""Files that the commands write, as patterns."""


EVERY = list(dict.fromkeys(command for text in PAGES.values() for command in commands(text)))


def here() -> "list[str]":
    """The commands that are run here, in their order, each once."""
    return [command for command in EVERY if not is_elsewhere(command)]


def is_elsewhere(command: str) -> bool:
    """Whether a command is one of `ELSEWHERE`."""
    return any(f"{command} ".startswith(start) for start in ELSEWHERE)


def run(command: str, *more: str) -> None:
    """Runs a command in this process, through the entry point of its console script."""
    from nerfstudio.configs.base_config import writer  # nerfstudio.utils.writer cannot be the first import

    program, *arguments = shlex.split(command.replace('"..."', '"give the bear a hat"'))
    sys.argv = [program, *arguments, *more]
    print(f"$ {shlex.join(sys.argv)}", flush=True)
    (script,) = entry_points(group="console_scripts", name=program)
    try:
        script.load()()
    except SystemExit as ending:
        assert not ending.code, ending.code
    writer.EVENT_WRITERS.clear()  # or the next run would write into this one's


def main() -> None:
    """Runs all commands in a folder; ends with the first that fails."""
    os.chdir(sys.argv[1])
    run(" ".join(BASE.split()))
    for number, command in enumerate(here()):
        if command.startswith("ns-render") and shutil.which("ffmpeg") is None:
            continue
        more = [word for start, words in SHORTER.items() if f"{command} ".startswith(start) for word in words]
        if command.startswith("ns-train"):
            # Later commands use the first of these runs.
            more += ["--timestamp", str(number) if Path("outputs/scene/wys/DATE").exists() else "DATE"]
        try:
            run(command, *more)
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f"failed: {command}") from None


def in_hub_cache(cache: Path, name: str, folder: Path) -> None:
    """Puts a folder where the hub's library keeps a repository that it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


@pytest.fixture(scope="module")
def folder(
    ring_scene: Path,
    editor_folder: Path,
    clip_folder: Path,
    detector_folder: Path,
    segmenter_folder: Path,
    torch_home: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder in which the commands were run, with the files that they need."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scene", "bear"):
        shutil.copytree(ring_scene, folder / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "photos").mkdir()
    for picture in sorted((ring_scene / "images").iterdir())[:2]:
        shutil.copy2(picture, folder / "photos")
    for name in ("bear.jpg", "view.png"):
        Image.open(folder / "photos" / "frame_000.png").save(folder / name)
    with (folder / "edits.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "instruction", "caption_before", "caption_after"])
        rows.writerow(["bear.jpg", "turn the bear into a panda", "a bear", "a panda"])
    in_hub_cache(folder / "hub", "timbrooks/instruct-pix2pix", editor_folder)
    in_hub_cache(folder / "hub", "IDEA-Research/grounding-dino-base", detector_folder)
    in_hub_cache(folder / "hub", "facebook/sam2.1-hiera-large", segmenter_folder)
    in_hub_cache(folder / "hub", "openai/clip-vit-large-patch14", clip_folder)
    (folder / "short.yaml").write_text("".join(f"{k[2:]}: {v}\n" for k, v in zip(SHORT[::2], SHORT[1::2])))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def test_the_commands_run_and_write_their_files(folder: Path) -> None:
    assert [pattern for pattern in LEFT if not list(folder.glob(pattern))] == []


def test_a_path_is_rendered_where_there_is_ffmpeg(folder: Path) -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("ns-render needs the ffmpeg program for paths")
    assert (folder / "renders" / "output.mp4").is_file()


@pytest.mark.parametrize("start", ELSEWHERE)
def test_every_other_command_is_run_elsewhere(start: str) -> None:
    file, word = ELSEWHERE[start]
    assert word in (ROOT / file).read_text("utf8")
    assert any(f"{command} ".startswith(start) for command in EVERY), "stale"


if __name__ == "__main__":
    main()
