"""`wys edit-image` from the command line: output files, and refusals before the editor is loaded."""

import json
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_wys, sentence_of
from emulated_gpu import emulated_gpu
from pages import PAGES, blocks
from PIL import Image
from profiled import peak_bytes

from wys_nerfstudio import __version__
from wys_nerfstudio.cli import edit_image as command
from wys_nerfstudio.editing import EditSettings, edit_image, load_editor
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import ImageFile, read_image

INSTRUCTION = "turn the bear into a panda"
EXTRAS = ("_relevance", "_mask", "_side_by_side")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    run_wys(monkeypatch, "edit-image", *arguments)


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    return sentence_of(lambda: run(monkeypatch, *arguments))


@pytest.fixture
def quick(editor_folder: Path) -> list[str]:
    return ["--editor", str(editor_folder), "--diffusion-steps", "2", "--device", "cpu"]


@pytest.mark.parametrize("method", ["local", "sds"])
@pytest.mark.parametrize("shape", [(33, 47, 3), (61, 22, 4), (20, 50)])
def test_pixels_outside_the_mask_are_bit_exact(tmp_path, monkeypatch, capsys, quick, shape, method):
    pixels = noise(*shape)
    source = save(tmp_path / "in.png", pixels)
    run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "new" / "out.png", "--method", method, *quick)
    edited, mask = read_pixels(tmp_path / "new" / "out.png"), read_pixels(tmp_path / "new" / "out_mask.png") > 0
    expected = pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, axis=2)
    assert edited.shape == expected.shape and mask.shape == shape[:2]
    assert mask.any() and not mask.all()
    assert np.array_equal(edited[~mask], expected[~mask])
    assert not np.array_equal(edited[mask], expected[mask])
    assert np.array_equal(edited[..., 3:], expected[..., 3:])
    relevance = read_pixels(tmp_path / "new" / "out_relevance.png")
    assert relevance[mask].min() >= 102 >= relevance[~mask].max()  # 0.4 as an 8-bit value
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(
        ["out.png", *(f"out{extra}.png" for extra in EXTRAS)]
    )
    assert np.array_equal(read_pixels(source), pixels)
    output = capsys.readouterr().out
    assert "in.png (1 of 1)" in output and "5/5" in output and "out.png" in output


def test_a_rotated_jpeg_is_edited_upright(tmp_path, monkeypatch, quick):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = save(tmp_path / "in.jpg", noise(24, 40, 3), exif=exif)
    run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *quick)
    edited, mask = read_pixels(tmp_path / "out.png"), read_pixels(tmp_path / "out_mask.png") > 0
    upright = np.rot90(read_pixels(source), -1)
    assert edited.shape == (40, 24, 3)
    assert np.array_equal(edited[~mask], upright[~mask])
    with Image.open(tmp_path / "out.png") as written:
        assert 0x0112 not in written.getexif()


def test_a_given_mask_is_used(tmp_path, monkeypatch, quick):
    pixels, mask = noise(30, 41, 3), np.zeros((30, 41), np.uint8)
    mask[4:20, 7:30] = 255
    source, mask_file = save(tmp_path / "in.png", pixels), save(tmp_path / "own.png", mask)
    run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", "--mask", mask_file, *quick)
    assert np.array_equal(read_pixels(tmp_path / "out_mask.png"), mask)
    assert np.array_equal(read_pixels(tmp_path / "out.png")[mask == 0], pixels[mask == 0])


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_outputs_do_not_overwrite_what_is_read(tmp_path, monkeypatch, quick, editor_folder, link):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_editor", lambda *_: pytest.fail("the editor was loaded"))
    save(Path("in.png"), noise(24, 32, 3))
    save(Path("panda_mask.png"), np.full((24, 32), 255, np.uint8))
    read = {"panda_mask.png": "panda.png", "in.png": "in.png", str(editor_folder / "model_index.json"): None}
    for number, (file, own_name) in enumerate(read.items()):
        if link is not None:
            link(Path(file).absolute(), f"{number}_side_by_side.png")
        output = own_name if link is None else f"{number}.png"
        if output is not None:
            before = Path(file).read_bytes()
            arguments = ("in.png", INSTRUCTION, "-o", output, "--mask", "panda_mask.png", *quick)
            assert "would overwrite" in refusal(monkeypatch, *arguments)
            assert Path(file).read_bytes() == before


def test_temporary_files_do_not_overwrite_inputs(tmp_path, monkeypatch, quick):
    source = save(tmp_path / "in.png", noise(24, 32, 3)).rename(tmp_path / "out.png.partial")
    assert "would overwrite" in refusal(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *quick)


def test_replaced_files_are_named(tmp_path, monkeypatch, capsys, quick):
    source, mask = save(tmp_path / "in.png", noise(24, 32, 3)), save(tmp_path / "x_mask.png", noise(24, 32, 3))
    arguments = (source, INSTRUCTION, "-o", f"{tmp_path}/x.png", *quick)
    run(monkeypatch, *arguments)
    assert capsys.readouterr().out.endswith(f"Replaced {mask}.\n")
    run(monkeypatch, *arguments)
    replaced = ", ".join(f"{tmp_path}/x{extra}.png" for extra in ("", *EXTRAS))
    assert capsys.readouterr().out.endswith(f"Replaced {replaced}.\n")


def test_a_trailing_separator_names_a_folder(tmp_path, monkeypatch, quick):
    source = save(tmp_path / "in.jpg", noise(24, 32, 3))
    run(monkeypatch, source, INSTRUCTION, "-o", f"{tmp_path}/new/folder/", *quick)
    assert (tmp_path / "new" / "folder" / "in.png").is_file()


def test_a_folder_is_edited_like_its_images(tmp_path, monkeypatch, quick, editor_folder):
    folder = tmp_path / "in"
    save(folder / "a.png", noise(33, 47, 3))
    save(folder / "b.jpg", noise(40, 24, 3, seed=1))
    (folder / "notes.txt").write_text("no image")
    run(monkeypatch, folder, INSTRUCTION, "-o", tmp_path / "out", "--seed", 5, "--mask-threshold", 0, *quick)
    assert len(list((tmp_path / "out").iterdir())) == 8
    settings = command.EditOptions(diffusion_steps=2, mask_threshold=0.0)
    for name in ("a.png", "b.jpg"):
        image = read_image(folder / name)
        edit = edit_image(load_editor(str(editor_folder)), image.rgb, INSTRUCTION, settings, seed=5)
        expected = (edit.edited * 255).round().numpy().astype(np.uint8)
        assert np.array_equal(read_pixels(tmp_path / "out" / f"{name[0]}.png"), expected)


def test_the_editors_precision_is_used(tmp_path, monkeypatch, quick, editor_folder):
    source = save(tmp_path / "in.png", noise(32, 32, 3))
    options = ["--mask-threshold", 0, "--editor-dtype", "bfloat16", *quick]
    run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *options)
    editor = load_editor(str(editor_folder), dtype="bfloat16")
    settings = command.EditOptions(diffusion_steps=2, mask_threshold=0.0)
    edit = edit_image(editor, read_image(source).rgb, INSTRUCTION, settings)
    expected = (edit.edited * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(read_pixels(tmp_path / "out.png"), expected)
    with Image.open(tmp_path / "out.png") as written:
        assert json.loads(written.text["wys-nerfstudio"])[-1]["editor_dtype"] == "bfloat16"  # type: ignore


def test_equal_seeds_give_equal_edits(tmp_path, monkeypatch, quick):
    source, edits = save(tmp_path / "in.png", noise(32, 32, 3)), []
    for i, seed in enumerate((1, 1, 2)):
        run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / f"{i}.png", "--seed", seed, *quick)
        edits.append((tmp_path / f"{i}.png").read_bytes())
    assert edits[0] == edits[1] != edits[2]


def test_an_empty_mask_is_reported_and_returns_the_input(tmp_path, monkeypatch, capsys, quick):
    source = save(tmp_path / "in.png", noise(32, 32, 3))
    monkeypatch.setattr("wys_nerfstudio.relevance.threshold", lambda maps, _: torch.zeros_like(maps, dtype=torch.bool))
    run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *quick)
    assert np.array_equal(read_pixels(tmp_path / "out.png"), read_pixels(source))
    assert "Lower --mask-threshold" in " ".join(capsys.readouterr().out.split())


def test_side_by_side_sheets_of_large_images_are_reduced(tmp_path, monkeypatch, quick):
    source = save(tmp_path / "in.png", noise(300, 1200, 3))
    run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *quick)
    with Image.open(tmp_path / "out_side_by_side.png") as sheet:
        assert sheet.width < 5 * 520 < 5 * 1200


def test_the_python_example_in_the_readme_runs(tmp_path, monkeypatch, editor_folder):
    (lines,) = blocks(PAGES["README.md"], "python")
    monkeypatch.chdir(tmp_path)
    save(Path("bear.jpg"), noise(32, 40, 3))
    few_steps = EditSettings(diffusion_steps=2)
    monkeypatch.setattr("wys_nerfstudio.editing.edit.EditOptions.resolve", lambda options, defaults: few_steps)
    exec(lines.replace("timbrooks/instruct-pix2pix", str(editor_folder)).replace('"cuda"', '"cpu"'))
    assert read_pixels(Path("panda.png")).shape == (32, 40, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.png"], "takes images and an instruction"),
        (["in.png", " "], "There is no instruction"),
        (["in.png", "b.png"], "is a file, not an instruction"),
        (["missing.png", INSTRUCTION], 'There is no image "missing.png"'),
        (["text.png", INSTRUCTION], "cannot be read"),
        (["empty", INSTRUCTION], 'There is no image in the folder "empty"'),
        (["small.png", INSTRUCTION], "must have at least 16"),
        (["in.png", INSTRUCTION, "--mask-threshold", "1.5"], "--mask-threshold must be between 0 and 1, not 1.5"),
        (["in.png", INSTRUCTION, "--mask", "none.png"], 'There is no mask "none.png"'),
        (["in.png", INSTRUCTION, "--mask", "small.png"], "give a mask of the image's size"),
        (["in.png", INSTRUCTION, "--mask", "b.png"], 'The mask "b.png" has 40x30 pixels, but "in.png" has 32x24'),
        (["in.png", INSTRUCTION, "--output", "out.jpg"], "lossless PNG"),
        (["in.png", "b.png", INSTRUCTION], "give -o a folder"),
        (["in.png", INSTRUCTION, "-o", "in.png"], "would overwrite"),
        (["in.png", INSTRUCTION, "-o", "text.png/out.png"], "cannot be created"),
        (["in.png", INSTRUCTION, "-o", "text.png/"], "cannot be created"),
        (["in.png", INSTRUCTION, "-o", f"{'o' * 253}.png"], "cannot be written (File name too long)"),
        ([f"{'i' * 300}.png", INSTRUCTION], "There is no image"),
        (["in.png", INSTRUCTION, "-o", "empty.png"], '"empty_mask.png" is a folder'),
        (["in.png", INSTRUCTION, "--device", "cuda:9"], '"cuda:9" is not available'),
        (["in.png", INSTRUCTION, "--device", "cuda:one"], '"cuda:one" is not available'),
        (["in.png", INSTRUCTION, "--device", "gpu"], 'The device "gpu" is not supported: --device takes cpu or cuda.'),
        (["in.png", INSTRUCTION, "--device", "mps"], 'The device "mps" is not supported: --device takes cpu or cuda.'),
    ],
)
def test_invalid_arguments_are_refused_without_an_editor(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_editor", lambda *_: pytest.fail("the editor was loaded"))
    save(Path("in.png"), noise(24, 32, 3))
    save(Path("b.png"), noise(30, 40, 3))
    save(Path("small.png"), noise(10, 10, 3))
    Path("text.png").write_text("not an image")
    Path("empty").mkdir()
    Path("empty_mask.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    output = [] if {"-o", "--output"} & set(arguments) else ["-o", "out.png"]
    assert message in refusal(monkeypatch, *arguments, *output)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("instruction", "editor", "message"),
    [
        ("turn the bear into a zebra", "embedded", "words that the editor"),
        ("give the bear a moustache", "embedded", "words that the editor"),
        ("make the ball blue " * 30, "embedded", "shorten it"),
        (INSTRUCTION, "no/editor/here", "There is no editor folder"),
    ],
)
def test_unsupported_instructions_are_refused(tmp_path, monkeypatch, instruction, editor, message):
    source = save(tmp_path / "in.png", noise(32, 32, 3))
    arguments = (source, instruction, "-o", tmp_path / "out.png", "--editor", editor, "--device", "cpu")
    assert message in refusal(monkeypatch, *arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["in.png"]


def test_edited_files_contain_their_provenance(tmp_path, monkeypatch, quick, editor_folder):
    instruction = 'クマ → „Pandabär“ 🐼 "now"'
    source = save(tmp_path / "in.png", noise(24, 40, 3))
    mask_file = save(tmp_path / "own.png", np.full((24, 40), 255, np.uint8))
    run(monkeypatch, source, instruction, "-o", tmp_path / "out.png", "--seed", 7, "--mask", mask_file, *quick)
    for name in ("out.png", "out_side_by_side.png"):
        with Image.open(tmp_path / name) as written:
            texts = written.text  # type: ignore
        assert texts["Software"] == f"wys-nerfstudio {__version__}"
        assert texts["Description"] == f'edited with wys-nerfstudio {__version__}: "{instruction}"'
        (metadata,) = json.loads(texts["wys-nerfstudio"])
        assert metadata["instruction"] == instruction
        assert metadata["editor"] == editor_folder.name, "only the name of a folder may be published"
        assert metadata == {
            **asdict(EditSettings(diffusion_steps=2)),
            "instruction": instruction,
            "editor": editor_folder.name,
            "editor_dtype": "float32",
            "seed": 7,
            "mask": "own.png",
        }


def test_all_written_files_have_their_provenance(tmp_path, monkeypatch, quick):
    source = save(tmp_path / "in.png", noise(24, 40, 3))
    run(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *quick)
    for extra in ("", *EXTRAS):
        with Image.open(tmp_path / f"out{extra}.png") as written:
            assert written.info["Software"] == f"wys-nerfstudio {__version__}"
            assert INSTRUCTION in written.info["Description"]


def test_consecutive_edits_keep_all_instructions(tmp_path, monkeypatch, quick):
    save(tmp_path / "0.png", noise(24, 40, 3))
    for number, instruction in enumerate(("make it red", "make it blue")):
        run(monkeypatch, tmp_path / f"{number}.png", instruction, "-o", tmp_path / f"{number + 1}.png", *quick)
    for name in ("2.png", "2_side_by_side.png"):
        with Image.open(tmp_path / name) as written:
            edits = json.loads(written.info["wys-nerfstudio"])
            assert [edit["instruction"] for edit in edits] == ["make it red", "make it blue"]


def test_unreadable_images_of_a_folder_are_reported(tmp_path, monkeypatch, capsys, quick):
    folder = tmp_path / "in"
    save(folder / "a.png", noise(24, 32, 3))
    save(folder / "c.bmp", noise(24, 32, 3, seed=1))
    (folder / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "d.png").write_text("damaged")
    sentence = refusal(monkeypatch, folder, INSTRUCTION, "-o", tmp_path / "out", *quick)
    assert sentence == f"wys: 2 of 4 images could not be edited: {folder}/b.heic, {folder}/d.png."
    errors = capsys.readouterr().err
    assert 'b.heic" is a HEIC image' in errors and 'd.png" (7 bytes) cannot be read' in errors
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"a.png", "c.png"}


def test_images_whose_edit_fails_do_not_end_the_others(tmp_path, monkeypatch, quick):
    folder, edit = tmp_path / "in", command.edit_image
    save(folder / "a.png", np.zeros((24, 32, 3), np.uint8))
    save(folder / "b.png", noise(24, 32, 3))

    def fail_for_black(editor, image, *arguments, **options):
        if not image.any():
            raise WysError("The editor failed.")
        return edit(editor, image, *arguments, **options)

    monkeypatch.setattr(command, "edit_image", fail_for_black)
    sentence = refusal(monkeypatch, folder, INSTRUCTION, "-o", tmp_path / "out", *quick)
    assert sentence == f"wys: 1 of 2 images could not be edited: {folder}/a.png."
    assert (tmp_path / "out" / "b.png").is_file() and not (tmp_path / "out" / "a.png").exists()


def test_a_full_disk_ends_with_a_sentence(tmp_path, monkeypatch, quick):
    def fill(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    source = save(tmp_path / "in.png", noise(24, 32, 3))
    monkeypatch.setattr(command, "write_image", fill)
    sentence = refusal(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *quick)
    assert 'out.png" could not be written (No space left on device)' in sentence


def test_more_steps_than_noise_levels_are_refused(tmp_path, monkeypatch, quick):
    source = save(tmp_path / "in.png", noise(24, 32, 3))
    options = (*quick, "--diffusion-steps", 5000)
    sentence = refusal(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *options)
    assert "has 999 noise levels" in sentence and "must be at most 999, not 5000" in sentence


def test_results_that_are_not_finite_leave_files_unchanged(tmp_path, monkeypatch, quick):
    source, output = save(tmp_path / "in.png", noise(24, 32, 3)), save(tmp_path / "out.png", noise(24, 32, 3, seed=1))
    before = output.read_bytes()
    sentence = refusal(monkeypatch, source, INSTRUCTION, "-o", output, *quick, "--guidance-scale", 1e38)
    assert "became NaN or Inf" in sentence and output.read_bytes() == before


def test_side_by_side_sheets_show_plain_instruct_pix2pix(tmp_path, editor_folder):
    source = read_image(save(tmp_path / "in.png", noise(32, 32, 3)))
    settings = command.EditOptions(diffusion_steps=2)
    editor = load_editor(str(editor_folder))
    edit = edit_image(editor, source.rgb, INSTRUCTION, settings, with_unmasked=True)
    plain = edit_image(editor, source.rgb, INSTRUCTION, replace(settings, mask_threshold=0.0)).edited
    assert edit.mask.any() and not edit.mask.all() and edit.unmasked is not None
    assert torch.equal(edit.unmasked, plain)
    sheet = np.array(command.side_by_side(source, edit, "in.png"))
    cell = sheet[18 : 18 + 160, 4 + 3 * 164 : 4 + 3 * 164 + 160]
    assert np.array_equal(cell[::5, ::5], (plain * 255).round().numpy().astype(np.uint8))
    assert edit_image(editor, source.rgb, INSTRUCTION, settings).unmasked is None


def test_8_bit_images_are_edited_like_floats(tmp_path, editor_folder):
    source = read_image(save(tmp_path / "in.png", noise(33, 47, 3)))
    editor, settings = load_editor(str(editor_folder)), command.EditOptions(diffusion_steps=2)
    bytes_, floats = (edit_image(editor, image, INSTRUCTION, settings) for image in (source.pixels, source.rgb))
    assert bytes_.edited.dtype == torch.uint8
    assert torch.equal(bytes_.edited, (floats.edited * 255).round().to(torch.uint8))


def test_large_images_take_few_bytes_per_pixel(tmp_path, editor_folder):
    pixels = torch.from_numpy(noise(1500, 2000, 3))
    editor, settings = load_editor(str(editor_folder)), command.EditOptions(diffusion_steps=1)
    image = ImageFile(pixels)

    def edit() -> None:
        command.side_by_side(image, edit_image(editor, pixels, INSTRUCTION, settings, with_unmasked=True), "in.png")

    assert peak_bytes(edit) < 30 * pixels.shape[0] * pixels.shape[1]


@pytest.mark.parametrize(
    ("part", "device", "remedy"),
    [
        ("decode", "cpu", "try a lower --resolution, such as --resolution 256."),
        ("decode", "cuda", "try a lower --resolution, such as --resolution 256, or --device cpu."),
        ("load_editor", "cpu", "try a lower --resolution, such as --resolution 256."),
    ],
)
def test_edits_out_of_memory_end_with_a_sentence(tmp_path, monkeypatch, editor_folder, part, device, remedy):
    def run_out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    source = save(tmp_path / "in.png", noise(32, 32, 3))
    owner = command if part == "load_editor" else StableDiffusionEditor
    monkeypatch.setattr(owner, part, run_out_of_memory)
    arguments = (source, INSTRUCTION, "-o", tmp_path / "out.png", "--editor", editor_folder, "--diffusion-steps", 1)
    with emulated_gpu() if device == "cuda" else nullcontext():
        sentence = refusal(monkeypatch, *arguments, "--device", device)
    assert sentence == f"wys: The GPU ran out of memory while images were edited: {remedy}"
    assert not (tmp_path / "out.png").exists()


def test_memory_errors_of_loading_are_not_taken_for_a_bad_folder(tmp_path, monkeypatch, quick):
    def run_out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")

    monkeypatch.setattr("diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL.from_pretrained", run_out_of_memory)
    source = save(tmp_path / "in.png", noise(32, 32, 3))
    sentence = refusal(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", *quick)
    assert sentence.startswith("wys: The computer ran out of memory while images were edited")


def test_a_full_gpu_is_not_reported_as_missing(tmp_path, monkeypatch):
    def run_out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", run_out_of_memory)
    source = save(tmp_path / "in.png", noise(32, 32, 3))
    sentence = refusal(monkeypatch, source, INSTRUCTION, "-o", tmp_path / "out.png", "--device", "cuda")
    assert sentence == "wys: The GPU ran out of memory in this command: end other programs that use its memory."
