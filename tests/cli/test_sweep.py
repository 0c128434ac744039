"""`wys sweep` from the command line: results compared with a slow reference, resuming, refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_wys, sentence_of
from filelock import FileLock
from flux2_folder import build_flux2_folder
from PIL import Image

from wys_nerfstudio.cli import sweep
from wys_nerfstudio.cli.sweep_plots import mean_points
from wys_nerfstudio.cli.sweep_table import SweepResult, read_cases
from wys_nerfstudio.editing import EditSettings, edit_image, load_editor
from wys_nerfstudio.evaluation.clip import ClipEncoder, load_clip
from wys_nerfstudio.utils.folder_lock import LOCK_FILE
from wys_nerfstudio.utils.image_io import read_image
from wys_nerfstudio.utils.visualization import SOFTWARE

ENTRIES = [
    {"image": "a.png", "instruction": "paint the ball red", "caption_before": "a ball", "caption_after": "a red ball"},
    {"image": "b.jpg", "instruction": "give it a hat", "caption_before": "a bear", "caption_after": "a bear of snow"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with two images and a list of their edits."""
    (tmp_path / "in").mkdir()
    for number, (name, shape) in enumerate({"a.png": (24, 40, 3), "b.jpg": (32, 32, 3)}.items()):
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    (tmp_path / "in" / "list.json").write_text(json.dumps(ENTRIES))
    return tmp_path


@pytest.fixture
def quick(editor_folder: Path, clip_folder: Path) -> list[str]:
    options = ["--editor", str(editor_folder), "--clip", str(clip_folder), "--diffusion-steps", "2", "--device", "cpu"]
    return [*options, "--mask-thresholds", "0", "0.5", "--image-guidance-scales", "1.0", "1.8"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    run_wys(monkeypatch, "sweep", *arguments)


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    return sentence_of(lambda: run(monkeypatch, *arguments))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_results_equal_their_slow_reference(folder, monkeypatch, quick, editor_folder, clip_folder):
    run(monkeypatch, folder / "in" / "list.json", "-o", folder / "out", "--seed", 3, *quick)
    rows = table(folder / "out")
    assert len(rows) == 2 * 2 * 2
    editor, clip = load_editor(str(editor_folder)), load_clip(str(clip_folder))
    for number, entry in enumerate(ENTRIES):
        rgb = read_image(folder / "in" / entry["image"]).rgb
        texts = clip.embed_texts([entry["caption_before"], entry["caption_after"]])
        for tau in (0.0, 0.5):
            for scale in (1.0, 1.8):
                (row,) = [
                    r
                    for r in rows
                    if (int(r["case"]), float(r["mask_threshold"]), float(r["image_guidance_scale"]))
                    == (number, tau, scale)
                ]
                settings = EditSettings(mask_threshold=tau, image_guidance_scale=scale, diffusion_steps=2)
                edited = edit_image(editor, rgb, entry["instruction"], settings, seed=3).edited
                written = read_image(folder / "out" / row["file"]).rgb
                assert (written - edited).abs().max() <= 0.5 / 255 + 1e-6
                before, after = clip.embed_images(torch.stack([rgb, edited]))
                assert float(row["image_similarity"]) == pytest.approx(cosine(before, after), abs=1e-5)
                assert float(row["text_image_similarity"]) == pytest.approx(cosine(after, texts[1]), abs=1e-5)
                direction = cosine(after - before, texts[1] - texts[0])
                assert float(row["direction_similarity"]) == pytest.approx(direction, abs=1e-4)
                assert row["instruction"] == entry["instruction"] and row["image"] == entry["image"]
    for name in ("curves.png", "grids/000.png", "grids/001.png"):
        with Image.open(folder / "out" / name) as plot:
            assert min(plot.size) > 100 and np.asarray(plot.convert("L")).std() > 5
            assert plot.info["Software"] == SOFTWARE and "edit" in plot.info["Description"]
    with Image.open(folder / "out" / rows[0]["file"]) as first:
        assert json.loads(first.text["wys-nerfstudio"])[0]["instruction"] == ENTRIES[0]["instruction"]  # type: ignore


def test_the_editors_precision_is_used(folder, monkeypatch, quick):
    arguments = [folder / "in" / "list.json", "-o", folder / "out", *quick, "--editor-dtype", "bfloat16"]
    load, precisions = sweep.load_editor, []

    def watched(*names):
        editor = load(*names)
        precisions.append(editor.unet.dtype)
        return editor

    monkeypatch.setattr(sweep, "load_editor", watched)
    run(monkeypatch, *arguments)
    assert precisions == [torch.bfloat16]
    with Image.open(folder / "out" / table(folder / "out")[0]["file"]) as first:
        (record,) = json.loads(first.text["wys-nerfstudio"])  # type: ignore
        assert record["editor_dtype"] == "bfloat16"


def test_two_sweeps_do_not_write_one_folder(folder, monkeypatch, quick):
    (folder / "out").mkdir()
    with FileLock(folder / "out" / LOCK_FILE):
        sentence = refusal(monkeypatch, folder / "in" / "list.json", "-o", folder / "out", *quick)
    assert "Another process is writing the sweep in" in sentence


def test_sweeps_resume_and_finished_ones_load_no_editor(folder, monkeypatch, quick, capsys):
    arguments = [folder / "in" / "list.json", "-o", folder / "out", *quick]
    uninterrupted = [folder / "in" / "list.json", "-o", folder / "uninterrupted", *quick]
    edit, count = sweep.edit_image, 0

    def interrupt_after_three(*args, **options):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return edit(*args, **options)

    monkeypatch.setattr(sweep, "edit_image", interrupt_after_three)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 130
    assert len(table(folder / "out")) == 3
    assert not list(folder.rglob("*.partial"))
    first = (folder / "out" / table(folder / "out")[0]["file"]).stat().st_mtime_ns
    run(monkeypatch, *arguments)
    assert count == 4 + 5, "finished edits must not be repeated"
    assert "5/5" in capsys.readouterr().out
    assert (folder / "out" / table(folder / "out")[0]["file"]).stat().st_mtime_ns == first
    run(monkeypatch, *uninterrupted)
    assert (folder / "out" / "sweep.csv").read_bytes() == (folder / "uninterrupted" / "sweep.csv").read_bytes()

    monkeypatch.setattr(sweep, "load_editor", None)
    (folder / "out" / "curves.png").unlink()
    run(monkeypatch, *arguments)
    assert (folder / "out" / "curves.png").is_file()


def test_a_folder_of_another_sweep_is_refused(folder, monkeypatch, quick):
    arguments = [folder / "in" / "list.json", "-o", folder / "out", *quick]
    run(monkeypatch, *arguments)
    before = (folder / "out" / "sweep.csv").read_bytes()
    sentence = f'"{folder / "out"}" contains a sweep with another list or other settings: give -o another folder'
    assert sentence in refusal(monkeypatch, *arguments, "--seed", 1)
    assert sentence in refusal(monkeypatch, *arguments, "--guidance-scale", 3)
    assert sentence in refusal(monkeypatch, *arguments, "--editor-dtype", "bfloat16")
    Image.new("RGB", (24, 40)).save(folder / "in" / "a.png")
    assert sentence in refusal(monkeypatch, *arguments)
    assert (folder / "out" / "sweep.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "options"),
    [({"caption_after": "ball " * 11}, []), ({"instruction": "x " * 60}, []), ({}, ["--editor", "missing"]),
     ({}, ["--clip", "nobody/no-clip"])],
)  # fmt: skip
def test_a_corrected_list_can_use_the_folder_of_a_refused_one(folder, monkeypatch, quick, entry, options):
    file = folder / "in" / "list.json"
    file.write_text(json.dumps([ENTRIES[0], {**ENTRIES[1], **entry}]))
    refusal(monkeypatch, file, "-o", folder / "out", *quick, *options)
    file.write_text(json.dumps(ENTRIES[:1]))
    run(monkeypatch, file, "-o", folder / "out", *quick)
    assert len(table(folder / "out")) == 4


def truncate(path: Path, count: int = 20) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda out: (out / "edits" / "000_tau_0.5_si_1.png").unlink(), 1),
        (lambda out: truncate(out / "edits" / "000_tau_0.5_si_1.png", 200), 1),
        (lambda out: (out / "edits" / "000_tau_0.5_si_1.png").write_bytes(b""), 1),
        (lambda out: truncate(out / "sweep.csv"), 1),
        (lambda out: (out / "sweep.csv").write_text((out / "sweep.csv").read_text().replace("0.5,1.8", "0.5,x")), 1),
        (lambda out: (out / "sweep.csv").write_bytes(b"\x00\x80"), 4),
        (lambda out: (out / "sweep.csv").write_bytes(b""), 4),
        (lambda out: (out / "sweep.csv").unlink(), 4),
    ],
)
def test_missing_and_damaged_edits_are_made_again(folder, monkeypatch, quick, damage, missing):
    (folder / "in" / "list.json").write_text(json.dumps(ENTRIES[:1]))
    arguments = [folder / "in" / "list.json", "-o", folder / "out", *quick]
    run(monkeypatch, *arguments)
    files = {path: path.read_bytes() for path in (folder / "out").rglob("*.*") if path.name != "curves.png"}
    damage(folder / "out")
    made, edit = [], sweep.edit_image
    monkeypatch.setattr(sweep, "edit_image", lambda *args, **options: made.append(args) or edit(*args, **options))
    run(monkeypatch, *arguments)
    assert len(made) == missing
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda file: file.write_bytes(b"\x80")])
def test_a_sweep_of_unknown_settings_is_refused(folder, monkeypatch, quick, damage):
    (folder / "in" / "list.json").write_text(json.dumps(ENTRIES[:1]))
    arguments = [folder / "in" / "list.json", "-o", folder / "out", *quick]
    run(monkeypatch, *arguments)
    damage(folder / "out" / "sweep.json")
    before = (folder / "out" / "sweep.csv").read_bytes()
    assert "contains a sweep whose sweep.json is missing or damaged: give -o another folder" in refusal(
        monkeypatch, *arguments
    )
    assert (folder / "out" / "sweep.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["sweep.csv", "sweep.json"])
def test_a_sweep_does_not_overwrite_its_list(folder, monkeypatch, quick, name):
    file = folder / "in" / name
    lines = [",".join(ENTRIES[0]), *(",".join(entry.values()) for entry in ENTRIES)]
    file.write_text("\n".join(lines) if name.endswith("csv") else json.dumps(ENTRIES))
    before = file.read_bytes()
    for output in (folder / "in", folder / "in" / ".." / "in"):
        assert f'would overwrite "{file}", which is read: give -o another path.' in refusal(
            monkeypatch, file, "-o", output, *quick
        )
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["curves.png", "edits/000_tau_0.5_si_1.png", "grids/000.png"])
def test_a_sweep_does_not_overwrite_its_images(folder, monkeypatch, quick, name):
    image = folder / "in" / name
    image.parent.mkdir(exist_ok=True)
    (folder / "in" / "a.png").rename(image)
    (folder / "in" / "list.json").write_text(json.dumps([{**ENTRIES[0], "image": name}]))
    before = image.read_bytes()
    sentence = refusal(monkeypatch, folder / "in" / "list.json", "-o", folder / "in", *quick)
    assert f'would overwrite "{image}", which is read: give -o another path.' in sentence
    assert image.read_bytes() == before and not (folder / "in" / "sweep.json").exists()


def test_csv_yaml_and_json_lists_are_equivalent(folder):
    expected = read_cases(folder / "in" / "list.json")
    assert [case.instruction for case in expected] == [entry["instruction"] for entry in ENTRIES]
    lines = [",".join(ENTRIES[0]), *(",".join(entry.values()) for entry in ENTRIES)]
    (folder / "in" / "list.csv").write_text("\n".join(lines), "utf-8-sig")
    text = "".join("- " + "\n  ".join(f"{key}: {value}" for key, value in entry.items()) + "\n" for entry in ENTRIES)
    (folder / "in" / "list.yaml").write_text(text)
    assert read_cases(folder / "in" / "list.csv") == expected == read_cases(folder / "in" / "list.yaml")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("none.csv", None, "There is no list"),
        (
            "list.txt",
            "a",
            "is not a list of edits: wys sweep takes a .csv, .yaml or .json list with image, instruction",
        ),
        ("list.json", "{", "cannot be read"),
        ("list.json", "[]", "There are no edits in"),
        ("list.json", '{"image": "a.png"}', "There are no edits in"),
        ("list.json", '["a.png"]', 'Edit 1 of "{file}" has no image'),
        ("list.csv", "image,instruction\na.png,make it red\n", 'Edit 1 of "{file}" has no caption_before'),
        ("list.csv", "image,instruction,caption_before,caption_after\na.png, ,a,b\n", "has no instruction"),
        ("list.csv", "image,instruction,caption_before,caption_after\nc.png,x,a,b\n", "There is no image"),
    ],
)
def test_invalid_lists_are_refused(folder, monkeypatch, quick, name, text, sentence):
    file = folder / "in" / name
    if text is not None:
        file.write_text(text)
    assert sentence.format(file=file) in refusal(monkeypatch, file, "-o", folder / "out", *quick)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--mask-thresholds", "0.5", "1.5"], "--mask-threshold must be between 0 and 1, not 1.5"),
        (["--mask-thresholds", "0.5", "0.5"], "--mask-thresholds takes one or more different numbers"),
        (["--mask-thresholds", "0.5", "0.5000001"], "--mask-thresholds takes one or more different numbers"),
        (["--image-guidance-scales"], "--image-guidance-scales takes one or more different numbers"),
        (["--diffusion-steps", "0"], "--diffusion-steps must be at least 1, not 0"),
        (["--device", "cuda:9"], 'The device "cuda:9" is not available'),
        (["--device", "mps"], 'The device "mps" is not supported: --device takes cpu or cuda.'),
        (["--clip", "nobody/no-clip"], 'The CLIP model "nobody/no-clip" is not downloaded'),
        (["--diffusion-steps", "5000"], "must be at most 999, not 5000"),
        (["--editor", "missing"], 'There is no editor folder "missing"'),
    ],
)
def test_invalid_settings_are_refused(folder, monkeypatch, quick, options, sentence):
    arguments = [*quick, *options]
    assert sentence in refusal(monkeypatch, folder / "in" / "list.json", "-o", folder / "out", *arguments)
    assert not (folder / "out" / "sweep.csv").exists()


def test_overlong_captions_are_refused_before_the_first_edit(folder, monkeypatch, quick):
    entries = [ENTRIES[0], {**ENTRIES[1], "caption_after": "ball " * 11}]
    (folder / "in" / "list.json").write_text(json.dumps(entries))
    sentence = refusal(monkeypatch, folder / "in" / "list.json", "-o", folder / "out", *quick)
    assert "has 13 tokens, but the CLIP model" in sentence
    assert not (folder / "out").exists()


@pytest.mark.parametrize("part", ["embed_texts", "embed_images"])
def test_sweeps_out_of_memory_end_with_a_sentence(folder, monkeypatch, quick, part):
    def run_out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ClipEncoder, part, run_out_of_memory)
    sentence = refusal(monkeypatch, folder / "in" / "list.json", "-o", folder / "out", *quick)
    remedy = "try a lower --resolution, such as --resolution 256."
    assert sentence == f"wys: The GPU ran out of memory while images were edited: {remedy}"


@pytest.mark.parametrize("distilled", [False, True])
def test_an_editor_without_image_guidance_is_swept_over_the_threshold(folder, monkeypatch, clip_folder, distilled):
    editor = build_flux2_folder(folder / "editor", distilled=distilled)
    options = ["--editor", editor, "--clip", clip_folder, "--device", "cpu", "--mask-thresholds", "0", "0.5"]
    command = [folder / "in" / "list.json", "-o", folder / "out", "--diffusion-steps", "2", *options]
    assert (
        "has no image guidance: leave out --image-guidance-scale (wys sweep: give --image-guidance-scales 1)"
        in refusal(monkeypatch, *command)
    )
    assert not (folder / "out").exists()
    run(monkeypatch, *command, "--image-guidance-scales", "1")
    rows = table(folder / "out")
    assert [(row["mask_threshold"], row["image_guidance_scale"]) for row in rows] == [
        ("0.0", "1.0"),
        ("0.5", "1.0"),
    ] * 2
    request = json.loads((folder / "out" / "sweep.json").read_text())["settings"]
    assert (request["guidance_scale"], request["diffusion_steps"]) == (1.0 if distilled else 4.0, 2)


def test_curves_are_averaged_over_the_cases():
    def row(case: int, tau: float, scale: float, direction: float, image: float) -> SweepResult:
        return SweepResult(case, "a.png", "x", tau, scale, direction, image, 0.0, "")

    rows = [
        row(0, 0.0, 1.0, 0.2, 0.5),
        row(0, 0.0, 2.0, 0.1, 0.8),
        row(1, 0.0, 1.0, 0.4, 0.7),
        row(1, 0.0, 2.0, 0.1, 1.0),
    ]
    rows += [row(case, 0.5, scale, 0.0, 1.0) for case in (0, 1) for scale in (1.0, 2.0)]
    curves = mean_points(rows)
    assert list(curves) == [0.0, 0.5]
    assert np.allclose(curves[0.0], [(1.0, 0.3, 0.6), (2.0, 0.1, 0.9)])
    assert np.allclose(curves[0.5], [(1.0, 0.0, 1.0), (2.0, 0.0, 1.0)])
