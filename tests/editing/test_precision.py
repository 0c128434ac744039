"""Half precision: relevance maps are those of float32, edits are close to them, and what overflows in the VAE is repeated."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from eps_editor import eps_editor
from flow_editor import FlowEditor
from test_edit import smooth_images

from wys_nerfstudio import relevance
from wys_nerfstudio.demo.images import LOCAL, SIDE, held_out_views
from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.editing import EditSettings, edit_images, load_editor, relevance_maps
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.evaluation.metrics import psnr

HALF = (torch.float16, torch.bfloat16)
MEAN_ERROR, MIN_IOU = 0.005, 0.97
"""Bounds on a normalized map's mean absolute difference to float32, and on the IoU of the masks at tau = 0.5."""
PICTURES = range(8, 12)
"""Of the toy world's held-out pictures; the bounds were chosen on the first eight, with other seeds."""


@pytest.fixture(scope="module")
def editors() -> dict[torch.dtype, StableDiffusionEditor]:
    """Editors with the rounding noise of a full-size network."""
    return {dtype: eps_editor(dtype) for dtype in (torch.float32, *HALF)}


@pytest.fixture(scope="module")
def pictures() -> list[tuple[torch.Tensor, str]]:
    """Toy pictures (h, w, 3) and an instruction for each."""
    views = islice(held_out_views(LOCAL), PICTURES.start, PICTURES.stop)
    instructions = [EDITS[LOCAL[number % len(LOCAL)]].wordings[0] for number in PICTURES]
    return [(view[-1].float() / 255, instruction) for view, instruction in zip(views, instructions)]


def normalized_map(editor: StableDiffusionEditor, image: torch.Tensor, instruction: str, seed: int) -> torch.Tensor:
    raw = next(relevance_maps(editor, image[None], instruction, seeds=[seed]))
    return relevance.upsample(raw, SIDE, SIDE, outlier_factor=1.5)[0]


def map_errors(editor, editors, pictures) -> tuple[list[float], list[float]]:
    """Return mean absolute differences to the float32 maps, and IoU of the masks, one per picture."""
    errors, overlaps = [], []
    for seed, (image, instruction) in enumerate(pictures, start=100):
        expected = normalized_map(editors[torch.float32], image, instruction, seed)
        result = normalized_map(editor, image, instruction, seed)
        errors.append(float((result - expected).abs().mean()))
        masks = expected >= 0.5, result >= 0.5
        assert 0.01 < float(masks[0].float().mean()) < 0.5
        overlaps.append(float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()))
    return errors, overlaps


@pytest.mark.parametrize("dtype", HALF)
def test_maps_in_half_precision_are_those_of_float32(dtype, editors, pictures):
    errors, overlaps = map_errors(editors[dtype], editors, pictures)
    assert max(errors) < MEAN_ERROR and min(overlaps) > MIN_IOU


@pytest.mark.parametrize(("dtype", "error", "iou"), [(torch.float16, 0.02, 0.95), (torch.bfloat16, 0.08, 0.8)])
def test_half_precision_arithmetic_would_spoil_the_maps(dtype, error, iou, editors, pictures, monkeypatch):
    monkeypatch.setattr(StableDiffusionEditor, "full_precision", lambda _: nullcontext())
    errors, overlaps = map_errors(editors[dtype], editors, pictures)
    assert min(errors) > error and sum(overlaps) / len(overlaps) < iou


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "minimum"), [(torch.float16, 50), (torch.bfloat16, 35)])
def test_edits_in_half_precision_are_close_to_float32(dtype, minimum, editors, pictures):
    image, instruction = pictures[0]
    mask = normalized_map(editors[torch.float32], image, instruction, seed=100) >= 0.5
    settings = EditSettings(guidance_scale=7.5, image_guidance_scale=1.5, diffusion_steps=20)

    def edited(of: torch.dtype, seed: int) -> torch.Tensor:
        arguments = {"instruction": instruction, "settings": settings, "strength": 1.0, "seeds": [seed]}
        return edit_images(editors[of], image[None], image[None], mask[None], **arguments)[0]

    expected = edited(torch.float32, 3)
    assert psnr(expected, image, mask) < 20 and psnr(edited(torch.float32, 4), expected, mask) < 32
    assert psnr(edited(dtype, 3), expected, mask) > minimum


# ------------------------------------------------------------------------------------------------------- full precision


def weights(editor: StableDiffusionEditor) -> list[torch.Tensor]:
    return [p for network in (editor.unet, editor.vae, editor.text_encoder) for p in network.parameters()]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_restored_after_full_precision(editor_folder: Path, dtype: str, fails: bool) -> None:
    editor = load_editor(str(editor_folder), dtype=dtype)
    before = [p.clone() for p in weights(editor)]
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), FlowEditor(editor).full_precision():
        assert {p.dtype for network in (editor.unet, editor.vae) for p in network.parameters()} == {torch.float32}
        with editor.full_precision():
            pass
        assert editor.unet.dtype == editor.vae.dtype == torch.float32
        assert fails is False or 1 / 0
    assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(weights(editor), before, strict=True))


def test_float32_weights_are_not_cast(editor_folder: Path) -> None:
    editor = load_editor(str(editor_folder), dtype="float16")
    editor.vae.float()  # as SDXL's
    before = [(p, p.data_ptr()) for p in editor.vae.parameters()]
    with editor.full_precision():
        assert all(p.data_ptr() == address for p, address in before)
    assert editor.vae.dtype == torch.float32 and editor.unet.dtype == torch.float16


@pytest.mark.parametrize(("matmul", "convolutions"), [("highest", True), ("medium", False)])
def test_full_precision_excludes_tf32(editor_folder, matmul, convolutions, monkeypatch):
    editor = load_editor(str(editor_folder))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(matmul)
        with editor.full_precision():
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == matmul and torch.backends.cudnn.allow_tf32 == convolutions
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_caller_of_relevance_maps_gets_half_precision(editor_folder: Path) -> None:
    """An edit between two batches of maps, or after maps that are abandoned, does not depend on them."""
    editor = load_editor(str(editor_folder), dtype="bfloat16")
    maps = relevance_maps(editor, smooth_images(2), "make it red", seeds=[0, 1], batch_size=1)
    next(maps)
    assert editor.unet.dtype == editor.vae.dtype == torch.bfloat16


def test_text_states_do_not_depend_on_where_they_are_encoded(editor_folder: Path) -> None:
    """They are cached: a resumed run encodes them elsewhere than the uninterrupted one."""
    one, other = (load_editor(str(editor_folder), dtype="bfloat16") for _ in range(2))
    with one.full_precision():
        states = one.encode_text("make it red")
    assert torch.equal(states, other.encode_text("make it red"))


# ------------------------------------------------------------------------------------------------------------- overflow


@pytest.fixture
def overflowing(editor_folder: Path) -> StableDiffusionEditor:
    """An editor in float16 whose VAE overflows at the second image of a batch: bright pixels, large latents."""
    editor = load_editor(str(editor_folder), dtype="float16")
    for layer in (editor.vae.encoder.conv_in, editor.vae.decoder.conv_in):
        with torch.no_grad():
            layer.weight.mul_(2**5)
    return editor


@contextmanager
def calls_of(vae, name: str) -> Iterator[list[tuple[int, torch.dtype]]]:
    """Record batch size and dtype of each call of a method of the VAE."""
    method, calls = getattr(vae, name), []
    setattr(vae, name, lambda x: (calls.append((len(x), x.dtype)), method(x))[1])
    yield calls
    setattr(vae, name, method)


def test_overflowing_images_are_decoded_in_float32(overflowing, caplog):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[1] *= 1e4
    with calls_of(overflowing.vae, "decode") as calls:
        images = overflowing.decode(latents)
    assert calls == [(3, torch.float16), (1, torch.float32)]
    assert images.isfinite().all() and overflowing.vae.dtype == torch.float16
    with overflowing.full_precision():
        exact = overflowing.decode(latents[1:2])
    assert torch.equal(images[1:2], exact)
    single = torch.cat([overflowing.decode(latents[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(single, images, atol=2e-3, rtol=0)
    sentence = "images with NaN or Inf are computed again in float32."
    assert [record.message.endswith(sentence) for record in caplog.records] == [True]
    assert f'"{overflowing.name}" overflows in float16' in caplog.text


def test_overflowing_images_are_encoded_in_float32(overflowing, caplog):
    images = smooth_images(3)
    images[1] *= 1e6
    with calls_of(overflowing.vae, "encode") as calls:
        latents = overflowing.encode(images).latents
    assert calls == [(3, torch.float16), (1, torch.float32)]
    assert latents.isfinite().all() and overflowing.vae.dtype == torch.float16
    with overflowing.full_precision():
        exact = overflowing.encode(images[1:2]).latents
    assert torch.equal(latents[1:2], exact)
    assert len(caplog.records) == 1


def test_a_repeated_decode_leaves_tf32_to_training(overflowing, monkeypatch):
    """It may run beside training, in a thread of its own; the flags are those of the process."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    decode, flags = overflowing.vae.decode, []
    overflowing.vae.decode = lambda x: (flags.append(torch.backends.cudnn.allow_tf32), decode(x))[1]
    overflowing.decode(torch.full((1, 4, 8, 8), 1e4))
    assert flags == [True, True]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_that_are_not_finite_are_tried_once(editor_folder: Path, dtype: str) -> None:
    editor = load_editor(str(editor_folder), dtype=dtype)
    torch.nn.init.constant_(editor.vae.decoder.conv_out.bias, float("nan"))
    with calls_of(editor.vae, "decode") as calls:
        assert editor.decode(torch.zeros(1, 4, 8, 8)).isnan().all()
    assert len(calls) == (1 if dtype == "float32" else 2)
