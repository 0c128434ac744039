"""Every benchmark runs, and the slow references that it compares with produce the same edits and maps as this package."""

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import page_tables
import pytest
import torch
from flux2_folder import build_flux2_folder
from nerfstudio.configs import base_config  # noqa: F401  # imported before the writer, which it imports in a circle
from nerfstudio.utils import writer
from qwen_folder import build_qwen_folder
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import architectures
import compat
import edit_phase
import families
import field
import flops
import full_size
import localization
import memory
import meta_device
import photographs
import region
import sampler
import scale
import schedule
import shortcuts
import speed
import startup
import views

from wys_nerfstudio.config import wys, wys_tiny
from wys_nerfstudio.demo.scene import write_demo_scene
from wys_nerfstudio.editing import EditOptions, Editor, EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.flux2 import Flux2Editor
from wys_nerfstudio.editing.qwen import QwenEditor
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.training.schedule import strength_of_edit
from wys_nerfstudio.utils.atomic_io import write_tensors
from wys_nerfstudio.utils.visualization import write_png


def test_the_tests_that_compat_runs_exist() -> None:
    assert all((compat.ROOT / "tests" / f"{name}.py").is_file() for name in compat.TESTS)


UV = """#!/bin/sh
# Stands in for uv in compat.py without downloads: each environment links to the current one.
case "$1 $2" in
"build -q") for folder; do case "$folder" in */wheel) mkdir -p "$folder"; touch "$folder/package.whl" ;; esac; done ;;
"venv -q") for folder; do :; done; mkdir -p "$folder"; ln -s "$CURRENT"/bin "$CURRENT"/lib "$CURRENT"/*.cfg "$folder" ;;
"pip install") ;;
*) exit 1 ;;
esac
"""


@pytest.mark.slow
def test_compat_installs_and_checks_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "uv").write_text(UV)
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("CURRENT", sys.prefix)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(compat.CHECKS, "tests", "echo 3 passed")
    monkeypatch.setitem(compat.CHECKS, "imports", "echo an error; exit 1")
    monkeypatch.setattr(sys, "argv", ["compat", "--output", str(tmp_path / "out"), "--rows", "3.11-newest"])
    compat.main()
    (row,) = capsys.readouterr().out.splitlines()[-1:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "3.11" and cells[1] == torch.__version__.split("+")[0]
    assert cells[5:] == ["yes", "an error", "yes", "yes", "3 passed"]
    assert not (tmp_path / "out" / "3.11-newest" / "environment").exists() and Path(sys.executable).exists()


@pytest.fixture(autouse=True)
def clear_event_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove nerfstudio's writers of earlier runs in this process, whose folders may not exist any more."""
    monkeypatch.setattr(writer, "EVENT_WRITERS", [])


@pytest.fixture(scope="module")
def editor(editor_folder: Path) -> StableDiffusionEditor:
    return load_editor(str(editor_folder))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 32, 40, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales", [(7.5, 1.5), (1.0, 1.0), (3.0, 1.0)])
def test_edits_equal_those_of_the_slow_reference(editor: StableDiffusionEditor, images: torch.Tensor, scales) -> None:
    strength, slow = 700 / 999, speed.slow_editor(editor)
    ours = edit_images(
        editor, images, images.flip(0), torch.ones(3, 32, 40, dtype=torch.bool), "make the ball blue",
        EditSettings(*scales, diffusion_steps=10), strength=strength, seeds=[5, 6, 7],
    )  # fmt: skip
    # The reference takes all steps at any noise level, so it is given the number of steps from this level.
    steps = len(editor.noise_levels(strength, 10, (8, 8))) - 1
    states = speed.slow_states(slow, "make the ball blue")
    for view, seed in enumerate((5, 6, 7)):
        render, captured = images[view : view + 1], images[2 - view : 3 - view]
        settings = EditSettings(*scales, diffusion_steps=steps)
        reference = speed.slow_edit(slow, render, captured, states, settings, strength, seed)[0]
        assert (reference - ours[view]).abs().max() < 1e-3
    assert (ours - images.flip(0)).abs().mean() > 0.01


def test_maps_equal_those_of_the_slow_reference(editor: StableDiffusionEditor, images: torch.Tensor) -> None:
    slow = speed.slow_editor(editor)
    ours = torch.cat(list(relevance_maps(editor, images, "make the ball blue", seeds=[1, 2, 3])))
    states = speed.slow_states(slow, "make the ball blue")
    for view, seed in enumerate((1, 2, 3)):
        image = images[view : view + 1]
        reference = speed.slow_map(slow, image, image, states, EditSettings(), seed)[0]
        assert torch.allclose(reference, ours[view], atol=1e-5) and reference.max() > 1e-3


def test_speed_measures_edits_maps_and_encoding(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = speed.Options(ring_scene, editor=str(editor_folder), instruction="make the ball blue")
    options.views, options.batch, options.repeats, options.output = 2, 2, 1, tmp_path / "speed.json"
    speed.main(options)
    assert capsys.readouterr().out.count("\n") == 6
    result = json.loads(options.output.read_text())
    assert [row["work"].split(",")[0] for row in result["rows"]] == [
        "edit",
        "relevance map",
        "edit",
        "hash encoding of 24",
    ]
    assert all(row["ratio"] == pytest.approx(row["slow"][1] / row["ours"][1]) for row in result["rows"])
    assert result["unet_gflop"] > 0.01


def test_field_compares_time_and_memory_with_nerfacto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    field.main(field.Options(rays=64, repeats=1, output=tmp_path / "field.json"))
    assert capsys.readouterr().out.count("\n") == 2 + 5 + 1 + 2 + 2
    result = json.loads((tmp_path / "field.json").read_text())
    rows = {row["step"]: row for row in result["steps"]}
    assert rows["nerfacto"]["time_ratio"] == rows["nerfacto"]["memory_ratio"] == 1
    # A localize step saves nothing of the scene for its backward pass; an edit step also saves the relevance head's part.
    localize, reconstruct, edit = (rows[f"wys, {phase}"]["mib"] for phase in ("localize", "reconstruct", "edit"))
    assert localize < reconstruct < edit
    assert len(result["encodings"]) == 2 and result["encodings"][0]["times_as_fast"] == 1


def test_count_of_a_linear_layer_and_of_attention() -> None:
    layer = torch.nn.Linear(16, 32, device="meta")
    tokens, few = torch.empty(1, 5, 10, 16, device="meta"), torch.empty(1, 5, 3, 16, device="meta")
    cost = meta_device.count(lambda: layer(tokens), [layer])
    assert cost.flop == 2 * 5 * 10 * 16 * 32
    assert cost.peak_bytes == 4 * (16 * 32 + 32) + 4 * 5 * 10 * (16 + 32)
    with meta_device.on_meta_device():
        attention = meta_device.count(lambda: F.scaled_dot_product_attention(few, tokens, tokens), [])
    assert attention.flop == 2 * 2 * 5 * 3 * 10 * 16
    assert attention.peak_bytes == 4 * 5 * (
        10 * 16 + 2 * 3 * 16 + 3
    )  # inputs, result and its logarithms, but no matrix


def test_memory_is_counted_while_tensors_exist() -> None:
    def work() -> None:
        first = torch.empty(100, device="meta")
        del first
        kept = torch.empty(60, device="meta")
        view = kept[:30]
        del kept
        torch.empty(50, device="meta")
        assert view is not None

    assert meta_device.count(work, []).peak_bytes == 4 * (60 + 50)


@pytest.fixture
def small_editors(editor_folder: Path, tmp_path: Path) -> list[Any]:
    """Editors of three families, on the CPU."""
    klein, qwen = build_flux2_folder(tmp_path / "klein"), build_qwen_folder(tmp_path / "qwen")
    return [load_editor(str(folder)) for folder in (editor_folder, klein, qwen)]


def on_meta(editor: Any) -> Any:
    """Move an editor to the meta device and replace a tokenizer whose tokens have to be there."""
    for network in flops.networks_of(editor).values():
        network.to("meta")
    if not isinstance(editor, QwenEditor):
        editor.tokenizer = flops.FullLengthTokenizer(editor.tokenizer.model_max_length)
        editor._texts.clear()
    return editor


def test_counts_equal_those_of_real_runs(small_editors: list[Any]) -> None:
    side, instruction = 64, flops.INSTRUCTION
    image, mask = torch.rand(2, side, side, 3), torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, :20] = True
    for editor in small_editors:
        settings = EditSettings(guidance_scale=3.0, image_guidance_scale=1.0, diffusion_steps=3, resolution=side)
        if isinstance(editor, StableDiffusionEditor):
            settings = replace(settings, image_guidance_scale=1.5)
        editor.encode_text(""), editor.encode_text(instruction)
        with meta_device.operation_counter() as real_edit:
            edit_images(editor, image[:1], image[:1], mask, instruction, settings, strength=1.0, seeds=[0])
        with meta_device.operation_counter() as real_maps:
            next(relevance_maps(editor, image, instruction, seeds=[0, 1], resolution=side))
        on_meta(editor)
        with meta_device.on_meta_device():
            edit = flops.edit_cost(editor, side, settings)
            maps = flops.map_cost(editor, side, settings, batch=2)
        assert edit.flop == real_edit.get_total_flops() > 0
        assert maps.flop == real_maps.get_total_flops() > 0


def test_parts_of_an_edit_add_up_to_whole_edits(small_editors: list[Any]) -> None:
    image, mask = torch.empty(1, 64, 64, 3, device="meta"), torch.empty(1, 64, 64, dtype=torch.bool, device="meta")
    with meta_device.on_meta_device():
        for editor in map(on_meta, small_editors):
            settings = replace(EditOptions().resolve(editor.profile.of_scenes), resolution=64, diffusion_steps=7)
            parts = flops.parts_of_edit(editor, 64, settings)
            assert flops.edit_cost(editor, 64, settings).flop == parts.edit(7, encodings=2)
            encoded, arguments = editor.encode(image), (editor, image, image, mask, flops.INSTRUCTION, settings)
            again = meta_device.count(
                lambda: edit_images(*arguments, strength=1.0, seeds=[0], encoded_reference=encoded), []
            )
            assert again.flop == parts.edit(7, encodings=1)
            assert (parts.text > 0) == isinstance(editor, QwenEditor)
            if isinstance(editor, StableDiffusionEditor):
                states, settings = speed.slow_states(editor, flops.INSTRUCTION), replace(settings, diffusion_steps=20)
                slow = meta_device.count(lambda: speed.slow_edit(editor, image, image, states, settings, 0.3, 0), [])
                assert slow.flop == parts.edit(20, encodings=2)


def test_flops_adds_up_maps_and_edits_of_a_scene(small_editors: list[Any]) -> None:
    options = flops.Options(Path(), views=3, edits=5)
    with meta_device.on_meta_device():
        for editor in map(on_meta, small_editors):
            weights = flops.weights_of(editor)  # first: text states are kept
            row, settings = flops.row_of(editor, 64, options), EditOptions().resolve(editor.profile.of_scenes)
            levels = [
                editor.noise_levels(strength_of_edit(0, i, 0.02, 0.98), settings.diffusion_steps, (8, 8))
                for i in range(5)
            ]
            assert row.scene_edit_steps == sum(len(run) - 1 for run in levels) / 5
            parts = flops.parts_of_edit(editor, 64, settings)
            edits = [parts.edit(len(run) - 1, encodings=1) / 1e12 for run in levels]
            assert row.scene_edit_tflop == pytest.approx(sum(edits) / 5)
            once = 3 * (row.map_tflop + parts.encoding / 1e12)
            assert row.scene_pflop == pytest.approx((once + sum(edits)) / 1000)
            assert row.edit_tflop == pytest.approx(parts.edit(row.edit_steps, encodings=2) / 1e12)
            assert weights.resident_gb < row.edit_gb and row.map_gb < row.maps_gb
            assert weights.gb == pytest.approx(4e-9 * sum(weights.parameters.values()))
            assert (weights.gb > weights.resident_gb) == isinstance(editor, Flux2Editor)  # its text encoder
            assert (weights.text_tflop > 0) != isinstance(editor, QwenEditor)  # part of maps and edits


def test_flops_writes_the_tables_of_the_page(
    small_editors: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flops, "build_editors", lambda: [on_meta(editor) for editor in small_editors])
    flops.main(flops.Options(tmp_path, sides=(64,), views=3, edits=5))
    assert "| 8 maps at 64, GB |" in capsys.readouterr().out
    names = [editor.name for editor in small_editors]
    for name in ("flops.json", "flops-edit.json", "flops-memory.json"):
        record = json.loads((tmp_path / name).read_text("utf8"))
        assert name == "flops-edit.json" or [row[0] for row in record["rows"]] == names
        assert {len(row) for row in record["rows"]} == {len(record["columns"])}


@pytest.mark.parametrize(
    "value, text",
    [(0.034, "0.03"), (2.718, "2.72"), (9.999, "10.00"), (28.57, "28.6"), (356.2, "356"), (7690.5, "7,690")],
)
def test_flops_rounds_to_three_digits(value: float, text: str) -> None:
    assert flops.rounded(value) == text


def test_the_page_has_the_operations_that_are_counted_now() -> None:
    editor = next(editor for editor in flops.build_editors() if isinstance(editor, StableDiffusionEditor))
    with meta_device.on_meta_device():
        row = flops.row_of(editor, 512, flops.Options(Path()))
        parts = flops.parts_table(editor, 512, 400)
    page = json.loads((page_tables.BENCHMARKS / "flops.json").read_text("utf8"))
    assert flops.operations_table([row]) == [page["columns"], page["rows"][0]]
    page = json.loads((page_tables.BENCHMARKS / "flops-edit.json").read_text("utf8"))
    assert parts == [page["columns"], *page["rows"]]


def test_families_compares_three_parametrizations_of_one_editor(tmp_path: Path) -> None:
    families.main(families.Options(pictures=2, levels=(0.8,), num_samples=1, output=tmp_path / "families.json"))
    rows = json.loads((tmp_path / "families.json").read_text("utf8"))
    assert [row["map"] for row in rows] == ["A", "B"] * 3
    precisions = [row["AP N=1"] for row in rows if row["map"] == "A"]
    assert min(precisions) > 0.7 and max(precisions) - min(precisions) < 0.01


def test_sampler_compares_edits_with_the_truth_and_the_converged_edit(tmp_path: Path) -> None:
    options = sampler.Options(
        pictures=2, seeds=1, guidance=((7.5, 1.5),), converged_steps=40, output=tmp_path / "s.json"
    )
    sampler.main(options)
    converged, *rows = json.loads(options.output.read_text("utf8"))
    assert converged["to the converged edit, dB"] == float("inf") and converged["steps"] == 40
    assert [(row["order"], row["steps"]) for row in rows] == sampler.CASES
    distances = {case: row["to the converged edit, dB"] for case, row in zip(sampler.CASES, rows)}
    assert distances[1, 20] > distances[1, 10] > 30
    assert all(abs(row["to the truth, dB"] - converged["to the truth, dB"]) < 1 for row in rows)


def test_shortcuts_compare_with_the_full_edit(tmp_path: Path) -> None:
    options = shortcuts.Options(pictures=2, seeds=1, strengths=(0.98,), steps=4, output=tmp_path / "shortcuts.json")
    shortcuts.main(options)
    full, *rows = json.loads(options.output.read_text("utf8"))
    assert [row["shortcut"] for row in rows] == list(shortcuts.CASES)[1:]
    assert full["to the truth, dB"] > full["before, dB"] and full["to the full edit, dB"] == ""
    distances = {row["shortcut"]: row["to the full edit, dB"] for row in rows}
    assert distances["encoder: box with 4 latents"] > distances["third prediction every second step"] > 20
    assert distances["third prediction only at signal < noise"] < distances["third prediction every second step"]
    assert 15 < distances["second prediction every second step"] < 60


@torch.no_grad()
def test_the_full_edit_of_shortcuts_is_that_of_the_package() -> None:
    editor = load_editor("embedded")
    (picture,) = families.pictures(1)
    edit = shortcuts.Edit(editor, picture, (2.0, 1.5), steps=4, strength=0.9, seed=3)
    expected = edit_images(
        editor,
        picture.image[None],
        picture.image[None],
        picture.mask[None],
        picture.instruction,
        EditSettings(2.0, 1.5, diffusion_steps=4, solver_order=2, resolution=max(picture.mask.shape)),
        strength=0.9,
        seeds=[3],
    )[0]
    torch.testing.assert_close(shortcuts.run(edit), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def panda_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five views of a toy scene, with the ground truth of an edit."""
    scene = tmp_path_factory.mktemp("schedule") / "scene"
    write_demo_scene(scene, width=40, height=40, num_views=5)
    return scene


@pytest.mark.slow
def test_schedule_measures_every_variant_from_one_state(
    panda_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "VARIANTS", [(2, 1, 64), (2, 1, 64), (4, 2, 64)])
    options = schedule.Options(panda_scene, seeds=(0,), output=tmp_path / "schedule.json")
    options.reconstruct_steps, options.localize_steps, options.edit_steps, options.measure_every = 4, 2, 12, 6
    options.views = 2
    schedule.main(options)
    rows = json.loads(options.output.read_text("utf8"))
    assert [(row["edit_every"], row["steps"], row["edits"]) for row in rows] == [
        (2, 6, 3), (2, 12, 6), (2, 6, 3), (2, 12, 6), (4, 6, 4), (4, 12, 6)
    ]  # fmt: skip
    measures = [(row["inside"], row["outside"], row["edit change"], row["render change"]) for row in rows]
    assert measures[:2] == measures[2:4] != measures[4:]
    assert capsys.readouterr().out.count("| turn the bear into a panda | ") == 2


def test_schedule_tables_compare_at_equal_cost_and_end_by_change() -> None:
    def row(seed: int, steps: int, seconds: float, inside: float, change: "float | None") -> dict[str, Any]:
        variant = {"instruction": "red", "edit_every": 5, "edit_count": 1, "rays": 64, "seed": seed, "steps": steps}
        kinds = {"render change": change, "edit change": None}
        return {**variant, "edits": steps // 5, "CPU seconds": seconds, "inside": inside, "outside": 30.0, **kinds}

    rows = [row(0, 10, 5.0, 10.0, None), row(0, 20, 10.0, 14.0, 0.04), row(0, 40, 20.0, 15.0, 0.02)]
    rows += [row(1, 10, 6.0, 11.0, None), row(1, 20, 12.0, 12.0, 0.2), row(1, 40, 24.0, 16.0, 0.2)]
    _, cheap = schedule.equal_cost_table(rows, 9.0)
    assert cheap == [
        "red", "5", "1", "64", "20", "4", "11", "13.00 (12.00 to 14.00)", "30.00 (30.00 to 30.00)"
    ]  # fmt: skip
    lines = {(line[0], line[1]): line[2:] for line in schedule.convergence_table(rows)[1:]}
    assert lines["render change", "0.05"] == ["25%", "0.50", "1.00"]  # one run of two ends at half of its steps
    assert lines["edit change", "0.09"] == ["0%", "0.00", "0.00"]


def test_region_counts_operations_and_compares_edits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_flux2_folder(tmp_path / "klein")
    editor = on_meta(load_editor(str(folder)))
    monkeypatch.setattr(region, "build_editors", lambda: [editor])
    options = region.Options(folder, tmp_path, every=(2, 4), sides=(64,), pictures=2, guidance_scales=(2.0,), steps=4)
    options.seeds = 1
    region.main(options)
    assert "| 4 | 25% | " in capsys.readouterr().out
    result = json.loads((tmp_path / "region.json").read_text())
    gains = {(row["every"], row["share"]): row["gain"] for row in result["gains"]}
    assert 1 < gains[2, 0.5] < gains[2, 0.1] < gains[4, 0.1] < 4
    # Text, noisy and reference tokens; in the region, a square and its margin. Other layers are few.
    (row,) = (row for row in result["gains"] if (row["every"], row["share"]) == (2, 0.25))
    assert row["region_tflop"] / row["whole_tflop"] == pytest.approx(10**2 / (24 + 2 * 16**2), rel=0.2)
    # Keys and values of all tokens in two layers of width 32, for two branches in float32.
    assert row["cache_gb"] * 1e9 == pytest.approx(2 * 2 * 4 * 2 * 32 * (24 + 2 * 16**2), rel=0.5)
    edits = {row["way"]: row for row in result["edits"]}
    assert edits["every step"]["to_whole"] == float("inf")
    assert edits["every 2 steps"]["to_whole"] > edits["every 4 steps"]["to_whole"] > edits["seed 1"]["to_whole"] + 10


def test_full_size_editors_have_the_public_numbers_of_parameters() -> None:
    with torch.device("meta"):
        networks = {
            **architectures.stable_diffusion(),
            "sdxl": architectures.sdxl()["unet"],
            **architectures.flux2_klein(),
        }
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert counts["unet"] == 859_532_484 and counts["sdxl"] == 2_567_475_204
    assert counts["transformer"] == 3_875_544_576 and counts["text_encoder"] == 4_022_468_096


@pytest.mark.slow
def test_startup_compares_with_a_run_without_the_plugin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "COMMANDS", (["--help"],))
    startup.main(startup.Options(repeats=1, output=tmp_path / "startup.json"))
    assert capsys.readouterr().out.count("\n") == 3
    (row,) = json.loads((tmp_path / "startup.json").read_text())["rows"]
    assert row["command"] == "ns-train --help" and row["added"] == row["with"][1] - row["without"][1]


@pytest.mark.slow
def test_scale_measures_memory_by_count_and_size_of_views(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = scale.Options(ring_scene, editor=str(editor_folder), instruction="make the ball blue", rounds=1)
    options.counts, options.sides, options.editing_sides, options.output = (3, 6), (40, 80), (20,), tmp_path / "scale"
    scale.main(options)
    assert "| 6 | 40 | " in capsys.readouterr().out and (options.output / "scale.png").is_file()
    rows = json.loads((options.output / "scale.json").read_text())["rows"]
    assert [(row["views"], row["side"]) for row in rows] == [(3, 40), (6, 40), (3, 40), (3, 80), (3, 40)]
    few, many, same, wide, _ = (row["mib_per_view"] for row in rows)
    # Captured and edited view in 8 bits; the maps are small.
    assert few == many == pytest.approx(32 * 40 * 6 / 2**20, rel=0.1) and same <= few
    assert wide == pytest.approx(4 * few, rel=0.1)
    for row in rows:
        assert min(row[name] for name in ("maps", "hull", "localize_step", "round")) > 0
        localization = row["hull"] + 400 * row["localize_step"]  # and 600 edit steps, five per round
        assert row["localization_share"] == pytest.approx(localization / (120 * row["round"]))


def test_the_scripted_editor_recolors_inside_the_mask_only(images: torch.Tensor) -> None:
    editor, mask = photographs.ScriptedEditor(jitter=0.0), torch.zeros(3, 32, 40, dtype=torch.bool)
    mask[:, 8:24, 8:32] = True
    settings = EditSettings(resolution=40, diffusion_steps=5)
    edited = edit_images(editor, images, images, mask, "any", settings, strength=0.8, seeds=[0, 1, 2])
    assert torch.equal(edited[~mask], images[~mask])
    assert torch.allclose(edited[mask], photographs.recolor(images)[mask], atol=1e-4)
    assert isinstance(editor, Editor)
    (maps,) = relevance_maps(editor, images, "any", seeds=[0, 1, 2], resolution=40)
    assert maps.shape == (3, 4, 5) and maps.min() > 0


def test_the_scripted_editor_varies_the_color_between_edits(images: torch.Tensor) -> None:
    editor, mask = photographs.ScriptedEditor(jitter=0.1), torch.ones(3, 32, 40, dtype=torch.bool)
    settings = EditSettings(resolution=40, diffusion_steps=5)
    same = images[:1].expand(3, -1, -1, -1)
    edits = [
        edit_images(editor, same, same, mask, "any", settings, strength=0.8, seeds=seeds)
        for seeds in ([0, 1, 2], [0, 1, 3])
    ]
    assert torch.allclose(edits[0][:2], edits[1][:2], atol=1e-5)
    assert (edits[0][2] - edits[1][2]).abs().mean() > 0.01 < (edits[0][0] - edits[0][1]).abs().mean()


def test_noisy_maps_show_halo_false_blobs_and_missing_objects() -> None:
    marks = torch.zeros(400, 64, 64, dtype=torch.bool)
    marks[:, 16:32, 16:32] = True
    options = photographs.Options(Path(), Path(), Path(), missing=0.25, blobs=0.0)
    maps = photographs.noisy_maps(marks, (16, 16), options, seed=0)
    shown = maps[:, 5:7, 5:7].mean(dim=(1, 2)) > 0.3
    assert 0.15 < 1 - shown.float().mean() < 0.35
    inside, halo, outside = maps[shown][:, 5:7, 5:7], maps[shown][:, 3, 5:7], maps[:, 12:, 12:]
    assert inside.mean() == pytest.approx(0.6, rel=0.1) and inside.mean() > 2 * halo.mean() > 4 * outside.mean()
    options.missing, options.blobs = 0.0, 1.0
    blobs = photographs.noisy_maps(marks, (16, 16), options, seed=0)[:, 12:, 12:]
    assert 0.1 < (blobs.amax(dim=(1, 2)) > 0.4).float().mean() < 0.5 and outside.amax() < 0.1


def test_color_deviation_is_that_of_the_views_means_inside_their_masks() -> None:
    captured = [torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    masks = [torch.zeros(4, 4, dtype=torch.bool) for _ in captured]
    masks[0][:2], masks[1][2:] = True, True
    shifted = [photographs.recolor(image) + shift for image, shift in zip(captured, (0.1, -0.1, 9.0))]
    assert photographs.color_deviation(shifted, captured, masks) == pytest.approx(0.2 / 2**0.5, abs=1e-5)


@pytest.mark.slow
def test_photographs_compares_field_and_maps_with_marks(
    ring_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    for path in sorted((ring_scene / "images").iterdir()):
        mask = torch.zeros(32, 40)
        mask[8:24, 8:32] = 1
        write_png(marks / f"{path.stem}.png", mask)
    options = photographs.Options(ring_scene, marks, tmp_path, seeds=(0, 1))
    options.reconstruct_steps = options.localize_steps = options.edit_steps = 10
    photographs.main(options)
    assert "| IoU of field and hull | " in capsys.readouterr().out
    first, second = json.loads((tmp_path / "photographs.json").read_text())["rows"]
    # The second run starts from the captured scene of the first.
    assert first["outside before, dB"] == pytest.approx(second["outside before, dB"], abs=0.01)
    assert "reconstruct, s" in first and "reconstruct, s" not in second
    assert {"localize, s", "edit, s", "end, s", "peak, GiB"} < second.keys()
    assert first["maps"]["AP"] > 0.5 and first["maps"] != second["maps"]
    assert 0 < first["color deviation of edited views"] < 0.3
    assert (tmp_path / "held_out_1.png").is_file()


@pytest.mark.slow
def test_full_size_measures_every_stage(ring_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_size.main(full_size.Options(ring_scene, tmp_path, views=4, side=80, steps=2, edits=1))
    assert "| contact sheet | " in capsys.readouterr().out
    rows = json.loads((tmp_path / "full_size.json").read_text())["rows"]
    assert [row["stage"] for row in rows][::5] == ["start-up", "begin of the edit phase", "ns-eval: start-up"]
    assert [row["stage"] for row in rows][-2:] == ["ns-eval: 1 held-out view", "ns-eval: 2 training views"]
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0.3 for row in rows)


@pytest.mark.slow
def test_views_measures_every_action_in_main_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views.main(views.Options(output=tmp_path, views=40, width=800, height=450))
    assert "| save, all views edited | " in capsys.readouterr().out
    result = json.loads((tmp_path / "views.json").read_text())
    assert result["stack_gib"] == pytest.approx(36 * 800 * 450 * 3 / 2**30)
    peaks = {row["action"]: row["peak_gib"] for row in result["rows"]}
    assert 0 < peaks["read"] and min(peaks.values()) >= 0
    # A save copies the edited views and serializes them. (The peak of reading includes modules that are imported then.)
    kept = {row["action"]: row["kept_gib"] for row in result["rows"]}
    assert peaks["save, all views edited"] >= kept["edit every view"] + result["stack_gib"]


@pytest.mark.slow
def test_localization_compares_maps_with_all_field_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = write_demo_scene(tmp_path / "scene", width=32, height=32, num_views=10)
    config: Any = copy.deepcopy(wys_tiny.config.pipeline)
    config.datamanager.data = scene
    base = tmp_path / "captured.ckpt"
    write_tensors(base, {"step": 0, "pipeline": config.setup(device="cpu", test_mode="val").weights()})
    options = localization.Options(scene, base, num_samples=1, steps=2, seeds=(0,), edits=("panda",))
    options.output = tmp_path / "localization.json"
    localization.main(options)
    assert "| maps | view | " in capsys.readouterr().out
    rows = json.loads(options.output.read_text())
    heads = ["geometry", "geometry+position", "hashgrid"]
    assert {(row["source"], row["normalization"]) for row in rows} == {
        (source, over)
        for source in ["maps", *heads, *(f"{head} and hull" for head in heads)]
        for over in ("view", "scene")
    }
    average_precision = {row["source"]: row["AP"] for row in rows if row["normalization"] == "view"}
    # The embedded editor localizes the bear; a relevance head trained for two steps on an untrained scene does not.
    assert average_precision["maps"] > 0.5 > average_precision["geometry"]


@pytest.fixture
def tiny_base(ring_scene: Path, editor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An untrained scene as a base run for wys-tiny, whose editor is replaced by the tests' editor."""
    tiny: Any = copy.deepcopy(wys_tiny)
    tiny.config.pipeline.editor = str(editor_folder)
    monkeypatch.setattr(speed, "wys_tiny", tiny)
    config = copy.deepcopy(tiny.config.pipeline)
    config.datamanager.data = ring_scene
    write_tensors(
        tmp_path / "captured.ckpt", {"step": 0, "pipeline": config.setup(device="cpu", test_mode="val").weights()}
    )
    return tmp_path / "captured.ckpt"


@pytest.mark.slow
def test_edit_phase_measures_its_parts_and_operations(
    ring_scene: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = edit_phase.Options(ring_scene, tiny_base, "make the ball blue", 1, tmp_path / "edit-phase.json")
    edit_phase.main(options)
    assert "| UNet | " in capsys.readouterr().out
    result = json.loads(options.output.read_text())
    assert set(result["parts"]) == {
        "backward pass of the steps", "forward pass of the steps", "optimizers", "the rest of the edit: masks, files",
        "render of the view", "UNet", "VAE",
    }  # fmt: skip
    assert all(seconds > 0 for seconds in result["parts"].values()) and len(result["operations"]) == 15


@pytest.mark.slow
@pytest.mark.parametrize("localized", [False, True])
def test_speed_measures_the_edit_phase(
    ring_scene: Path, tiny_base: Path, editor: StableDiffusionEditor, tmp_path: Path, localized: bool
) -> None:
    options = speed.Options(ring_scene, instruction="make the ball blue", batch=1, repeats=1)
    options.output = tmp_path / "speed.json"
    method: Any = (wys if localized else wys_tiny).config.pipeline
    row = speed.edit_phase_row(options, tiny_base, method, editor, speed.slow_editor(editor), localized)
    assert row.work.startswith(f"edit phase, S_T {7.5 if localized else 1:g}, {method.edit_every} steps and an edit")
    assert row.ours[0] > 0 and row.ratio == row.slow[1] / row.ours[1]


@pytest.mark.slow
def test_memory_measures_all_phases_in_a_process_of_their_own(
    ring_scene: Path, editor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.ones(2**28)  # 1 GiB: the peak of this process
    options = memory.Options(
        ring_scene, tmp_path, methods=("wys-tiny",), editor=str(editor_folder), views=4, side=40, steps=3
    )
    memory.main(options)
    assert "| `wys-tiny` | " in capsys.readouterr().out
    peaks = json.loads((tmp_path / "memory.json").read_text())["peak_gib"]["wys-tiny"]
    # On a CPU the peak is the maximum since the start of the process.
    # Linux counts resident memory to a few pages per thread.
    assert 0.1 < peaks["reconstruct"] <= peaks["localize"] + 0.01 <= peaks["edit"] + 0.02 < memory.peak_gib("cpu") - 0.5


def test_time_of_a_nested_part_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Work:
        def outer(self) -> str:
            return self.inner() + self.inner()

        def inner(self) -> str:
            return "x"

    clock = iter([0.0, 1.0, 3.0, 4.0, 7.0, 20.0])
    monkeypatch.setattr(edit_phase.time, "process_time", lambda: next(clock))
    work, stopwatch = Work(), edit_phase.Stopwatch()
    stopwatch.watch(work, "outer", "whole")
    stopwatch.watch(work, "inner", "part")
    assert work.outer() == "xx"
    assert stopwatch.seconds == {"part": 2 + 3, "whole": 20 - 5}
