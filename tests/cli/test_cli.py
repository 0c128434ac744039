"""Command line: parsing, short forms, recipes, refusals before the start of a run, config.yml."""

import dataclasses
import importlib.metadata
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
import yaml
from conftest import run_wys, sentence_of
from nerfstudio.configs import experiment_config
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion, all_methods
from nerfstudio.plugins.types import MethodSpecification

from wys_nerfstudio import trainer
from wys_nerfstudio.cli import compare
from wys_nerfstudio.editing.stable_diffusion import PROFILE
from wys_nerfstudio.model import RAYS_PER_CHUNK
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainerConfig
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.utils.recipes import recipe_arguments

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture(autouse=True)
def in_scene_folder(ring_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a scene folder: nerfstudio's default for --data is the current folder."""
    monkeypatch.chdir(ring_scene)


def parse(*arguments: str) -> WysTrainerConfig:
    return tyro.cli(AnnotatedBaseConfigUnion, args=list(arguments))  # type: ignore


def resolve(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> WysTrainerConfig:
    """Parse like ns-train and repeat what it does before it writes config.yml."""
    typed = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["ns-train", *typed])
    config = parse(*typed)
    if config.data is not None:
        config.pipeline.datamanager.data = config.data
    config.set_timestamp()
    return config


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    return sentence_of(lambda: resolve(monkeypatch, *arguments))


@pytest.mark.parametrize("name", ["wys", "wys-small", "wys-tiny"])
def test_methods_are_registered_under_their_own_name(name: str) -> None:
    (entry,) = importlib.metadata.entry_points(group="nerfstudio.method_configs", name=name)
    specification = entry.load()
    assert isinstance(specification, MethodSpecification) and specification.description
    assert all_methods[name] is specification.config
    assert specification.config.method_name == name
    groups = set(specification.config.optimizers)
    assert groups == {"proposal_networks", "fields", "camera_opt", "relevance"}


def test_the_small_method_differs_in_batch_sizes_only() -> None:
    """The settings of edits are equal."""
    large, small = (vars(all_methods[name].pipeline).copy() for name in ("wys", "wys-small"))
    rays = ("train_num_rays_per_batch", "edit_num_rays_per_batch")
    parts: list[tuple[dict, dict, tuple[str, ...]]] = [(large, small, ("relevance_batch_size",))]
    models = vars(large.pop("model")).copy(), vars(small.pop("model")).copy()
    chunks = [model.pop("eval_num_rays_per_chunk") for model in models]
    assert chunks == [0, RAYS_PER_CHUNK["torch"]]  # 0 is chosen by the backend
    parts += [(*models, ())]
    parts += [(vars(large.pop("datamanager")), vars(small.pop("datamanager")), (*rays, "eval_num_rays_per_batch"))]
    for first, second, smaller in parts:
        changed = {name for name in first if first[name] != second[name]} - {"images_on_gpu"}
        assert changed == set(smaller)
        # Views per pass of the editor default to the editor's own, which are several for InstructPix2Pix.
        assert all(second[name] < (first[name] or PROFILE.relevance_batch_size) for name in smaller)


@pytest.mark.parametrize(
    ("option", "value", "nested"),
    [
        ("--instruction", "Turn the bear into a panda", "instruction"),
        ("--base-run", "some/run", "base_run"),
        ("--editor", "some/folder", "editor"),
        ("--mask-threshold", "0.25", "mask_threshold"),
        ("--guidance-scale", "12.5", "guidance_scale"),
        ("--image-guidance-scale", "0.8", "image_guidance_scale"),
        ("--localization", "none", "localization"),
    ],
)
def test_short_forms_set_the_nested_options(option: str, value: str, nested: str) -> None:
    long = f"--pipeline.{nested.replace('_', '-')}"
    short_value = getattr(parse("wys", option, value).pipeline, nested)
    assert short_value == getattr(parse("wys", long, value).pipeline, nested)
    assert str(short_value) == value
    assert short_value != getattr(all_methods["wys"].pipeline, nested), "the registered default must not change"


def test_help_lists_every_option_with_its_docstring() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nerfstudio.scripts.train", "wys", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "100", "PATH": "", "HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""},
    )
    text = " ".join(done.stdout.replace("│", " ").split())
    for option in dataclasses.fields(WysPipelineConfig):
        if option.name in ("_target", "datamanager", "model", "resume_from", "resumed_steps", "cli_settings"):
            continue
        assert f"--pipeline.{option.name.replace('_', '-')}" in text, option.name
    for sentence in (
        "What to change, in words",
        "Folder or config.yml of a nerfacto or wys run whose scene is edited",
        "Pixels of at least this relevance are edited (tau)",
        "Weight of the perceptual loss on edited views",
        "Rays per step while the scene is edited",
        "YAML file of options",
        "Stop after this many steps in all",
    ):
        assert sentence in text
    assert "resume-from" not in text


def test_every_option_has_a_docstring() -> None:
    """The docstring of an option is its help text."""
    import ast
    import inspect

    from wys_nerfstudio import datamanager, model, pipeline

    for module in (datamanager, model, pipeline, trainer):
        for node in ast.parse(inspect.getsource(module)).body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
                continue
            for option, following in zip(node.body, [*node.body[1:], ast.Pass()]):
                if isinstance(option, ast.AnnAssign) and ast.unparse(option.target) != "_target":
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{node.name}.{ast.unparse(option.target)}"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse_through_the_command_line(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "wys-tiny" if recipe.stem.startswith("demo") else "wys"
    content = yaml.safe_load(recipe.read_text())
    typed = [] if "instruction" in content else ["--instruction", "make it red"]
    typed += ["--pipeline.masks-dir", str(tmp_path)] if recipe.stem == "masks" else []
    config = resolve(monkeypatch, method, "--recipe", recipe, *typed)
    assert config.pipeline.instruction == content.get("instruction", "make it red")
    assert config.pipeline.localization == content.get("localization", "relevance-field")
    config.pipeline.check(RunSettings.from_options(config.pipeline))
    for option in ("guidance-scale", "image-guidance-scale", "mask-threshold"):
        if option in content:
            assert getattr(config.pipeline, option.replace("-", "_")) == content[option]


def test_the_ablations_have_recipes() -> None:
    recipes = [yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("relevance-map", "masks", "none")]
    assert recipes == [{"localization": name} for name in ("relevance-map", "masks", "none")]


@pytest.mark.parametrize(("scene", "guidance"), [("bear", 6.5), ("face", 7.5), ("farm", 12.5), ("fangzhou", 6.5)])
def test_recipes_have_the_settings_of_the_supplement(scene: str, guidance: float) -> None:
    content = yaml.safe_load((CONFIGS / f"{scene}.yaml").read_text())
    assert (content["guidance-scale"], content["image-guidance-scale"], content["mask-threshold"]) == (
        guidance,
        1.5,
        0.5,
    )


@pytest.mark.parametrize("typed", ["0.5", "0.35"])
def test_typed_options_override_the_recipe(typed: str, ring_scene: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("instruction: from the recipe\nmask-threshold: 0.4\npipeline.edit-steps: 77\n")
    config = resolve(monkeypatch, "wys", "--mask-threshold", typed, "--recipe", recipe)
    assert config.pipeline.mask_threshold == float(typed)
    assert config.pipeline.edit_steps == 77
    assert config.pipeline.instruction == "from the recipe"
    config = resolve(monkeypatch, "wys", "--recipe", recipe, "--pipeline.instruction", "typed", "--data", ring_scene)
    assert config.pipeline.instruction == "typed"
    assert config.pipeline.datamanager.data == ring_scene


def test_invalid_recipes_are_refused(tmp_path: Path, monkeypatch) -> None:
    recipe = tmp_path / "r.yaml"
    assert "cannot be read" in refusal(monkeypatch, "wys", "--recipe", recipe)
    recipe.write_text("a: [1")
    assert "not valid YAML" in refusal(monkeypatch, "wys", "--recipe", recipe)
    recipe.write_text("- a\n- b\n")
    assert 'lines "option: value"' in refusal(monkeypatch, "wys", "--recipe", recipe)
    recipe.write_text("instruction: x\nno-such-option: 3\n")
    assert "has an unknown option" in refusal(monkeypatch, "wys", "--recipe", recipe)
    recipe.write_text("instruction: x\nmask-threshold: high\n")
    assert "or an invalid value" in refusal(monkeypatch, "wys", "--recipe", recipe)


def test_recipe_arguments_are_command_line_arguments(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("instruction: make it snow\nmask-threshold: 0\nmixed-precision: false\n")
    expected = ["--instruction=make it snow", "--mask-threshold=0", "--mixed-precision=False"]
    assert recipe_arguments(recipe) == expected


def test_values_in_recipes_are_never_options(tmp_path: Path, monkeypatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('instruction: "--output-dir=elsewhere"\n')
    config = resolve(monkeypatch, "wys", "--recipe", recipe)
    assert config.pipeline.instruction == "--output-dir=elsewhere" and config.output_dir == Path("outputs")
    recipe.write_text('instruction: x\nlogging.local-writer.stats-to-track: "--output-dir=elsewhere"\n')
    assert "or an invalid value" in refusal(monkeypatch, "wys", "--recipe", recipe)


def test_runs_of_one_second_get_their_own_folders(tmp_path: Path, monkeypatch) -> None:
    clock = SimpleNamespace(second=0)
    moment = SimpleNamespace(now=lambda: datetime(2026, 1, 1, 12, 0, clock.second))
    monkeypatch.setattr(experiment_config, "datetime", moment)
    monkeypatch.setattr(trainer.time, "sleep", lambda _: setattr(clock, "second", clock.second + 1))
    configs = [resolve(monkeypatch, "wys", "--instruction", "x", "--output-dir", tmp_path) for _ in range(3)]
    assert [config.timestamp for config in configs] == [f"2026-01-01_12000{second}" for second in range(3)]
    assert all(config.get_base_dir().is_dir() for config in configs)
    named = resolve(monkeypatch, "wys", "--instruction", "x", "--output-dir", tmp_path, "--timestamp", "mine")
    assert named.timestamp == "mine" and not named.get_base_dir().exists()


def test_prompt_sets_the_instruction_and_conflicts_are_refused(monkeypatch) -> None:
    assert resolve(monkeypatch, "wys", "--prompt", "make it snow").pipeline.instruction == "make it snow"
    sentence = refusal(monkeypatch, "wys", "--prompt", "make it snow", "--instruction", "make it night")
    assert "--prompt and --instruction" in sentence


def test_device_and_backend_match_the_machine(monkeypatch, capsys) -> None:
    config = resolve(monkeypatch, "wys", "--instruction", "x")
    assert config.machine.device_type == "cpu"
    assert config.pipeline.model.implementation == "torch"
    output = capsys.readouterr().out
    assert "running on the CPU. Try ns-train wys-tiny" in output and output.count("tiny-cuda-nn") == 1
    resolve(monkeypatch, "wys-tiny", "--instruction", "x")
    output = capsys.readouterr().out
    assert "running on the CPU." in output and "Try" not in output


def test_steps_are_the_sum_of_the_phases_unless_typed(monkeypatch, tmp_path: Path) -> None:
    phases = ["--pipeline.reconstruct-steps=5", "--pipeline.localize-steps=3", "--pipeline.edit-steps=2"]
    assert resolve(monkeypatch, "wys", "--instruction", "x", *phases).max_num_iterations == 10
    with_base = resolve(monkeypatch, "wys", "--instruction", "x", *phases, "--base-run", tmp_path)
    assert with_base.max_num_iterations == 5
    without_masks = resolve(monkeypatch, "wys", "--instruction", "x", *phases, "--localization", "none")
    assert without_masks.max_num_iterations == 7
    assert resolve(monkeypatch, "wys", "--instruction", "x", "--max-num-iterations=4").max_num_iterations == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no instruction", "--instruction"]),
        (["--instruction", "  "], ["no instruction"]),
        (["--mask-threshold", "1.5"], ["--mask-threshold must be between 0 and 1, not 1.5"]),
        (["--mask-threshold", "-0.1"], ["--mask-threshold must be between 0 and 1"]),
        (["--mask-threshold", "nan"], ["--mask-threshold must be between 0 and 1"]),
        (["--pipeline.relevance-noise-level", "1"], ["--pipeline.relevance-noise-level must be above 0 and below 1"]),
        (["--pipeline.min-strength", "0"], ["--pipeline.min-strength must be above 0"]),
        (["--pipeline.min-strength", "0.9", "--pipeline.max-strength", "0.5"], ["swap them"]),
        (["--pipeline.relevance-outlier-factor", "-1"], ["--pipeline.relevance-outlier-factor must be at least 0"]),
        (
            ["--pipeline.model.relevance-expectile", "1"],
            ["--pipeline.model.relevance-expectile must be above 0 and below 1"],
        ),
        (["--pipeline.edit-every", "0"], ["--pipeline.edit-every must be at least 1, not 0"]),
        (["--pipeline.edit-count", "0"], ["--pipeline.edit-count must be at least 1"]),
        (["--pipeline.diffusion-steps", "0"], ["--pipeline.diffusion-steps must be at least 1"]),
        (["--pipeline.relevance-num-samples", "0"], ["--pipeline.relevance-num-samples must be at least 1"]),
        (["--pipeline.edit-steps", "0"], ["--pipeline.edit-steps must be at least 1"]),
        (["--pipeline.localize-steps", "0"], ["--pipeline.localize-steps above 0"]),
        (["--localization", "masks"], ["--pipeline.masks-dir", "give both or none"]),
        (["--pipeline.masks-dir", "m"], ["--localization masks", "give both or none"]),
        (["--pipeline.model.predict-normals", "True"], ["--pipeline.model.predict-normals is not supported"]),
        (["--pipeline.datamanager.edit-patch-size", "16"], ["at least 32", "--pipeline.model.lpips-loss-mult 0"]),
        (
            ["--pipeline.datamanager.train-num-images-to-sample-from", "4"],
            ["leave out --pipeline.datamanager.train-num-images-to-sample-from"],
        ),
        (["--data", "missing/folder"], ["no data at", "--data"]),
        (["--load-dir", "missing/folder"], ["No checkpoint found in", "--load-dir"]),
    ],
)
def test_invalid_options_are_refused_in_one_sentence(arguments: list[str], parts: list[str], monkeypatch) -> None:
    typed = arguments if not arguments or "--instruction" in arguments else ["--instruction", "x", *arguments]
    sentence = refusal(monkeypatch, "wys", *typed)
    assert all(part in sentence for part in parts), sentence


def test_refusals_print_no_traceback_and_write_no_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "nerfstudio.scripts.train",
            "wys",
            "--output-dir",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("wys: There is no instruction")
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_configs_round_trip_through_yaml(monkeypatch) -> None:
    config = resolve(monkeypatch, "wys-tiny", "--instruction", "make it snow", "--mask-threshold", "0.4")
    loaded = yaml.load(yaml.dump(config), Loader=yaml.Loader)
    assert loaded == config
    assert loaded.pipeline.instruction == "make it snow" and loaded.pipeline.editor == "embedded"


def test_wys_help_lists_the_subcommands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wys_nerfstudio.cli.main", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "demo" in done.stdout and "demo-scene" in done.stdout


def test_wys_prints_no_deprecation_warnings(tmp_path: Path) -> None:
    arguments = ["compare", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "wys_nerfstudio.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.strip().startswith("wys: There is no config.yml")


def test_demo_scenes_of_invalid_sizes_are_refused(tmp_path: Path) -> None:
    arguments = ["demo-scene", str(tmp_path / "scene"), "--width", "50"]
    done = subprocess.run(
        [sys.executable, "-m", "wys_nerfstudio.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.strip().startswith("wys: ") and "multiples of 8" in done.stderr
    assert not (tmp_path / "scene").exists()


def test_a_command_out_of_memory_ends_with_a_sentence(tmp_path: Path, monkeypatch) -> None:
    def run_out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compare, "compare_runs", run_out_of_memory)
    sentence = sentence_of(lambda: run_wys(monkeypatch, "compare", tmp_path))
    assert sentence == "wys: The GPU ran out of memory in this command: end other programs that use its memory."


@pytest.mark.parametrize("command", ["demo-scene", "demo-pictures", "demo"])
def test_demo_files_never_replace_those_of_a_folder(command: str, tmp_path: Path, monkeypatch) -> None:
    photo = tmp_path / ("scene" if command == "demo" else "") / "images" / "frame_00001.png"
    photo.parent.mkdir(parents=True)
    photo.write_text("a photograph")
    arguments = ["--output", tmp_path] if command == "demo" else [tmp_path]
    sentence = sentence_of(lambda: run_wys(monkeypatch, command, *arguments))
    assert f'The folder "{photo.parent.parent}" is not empty: give a new one.' in sentence
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [photo] and photo.read_text() == "a photograph"
