"""FLUX.2 klein with tiny random networks, compared with diffusers' pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_gpu import OnGpu, emulated_gpu
from flux2_folder import LAYERS, TOKENS, build_flux2_folder

from wys_nerfstudio.editing import (
    EditOptions,
    Editor,
    EditSettings,
    edit_image,
    edit_images,
    load_editor,
    relevance_maps,
)
from wys_nerfstudio.editing.edit import WITH_AND_WITHOUT_TEXT
from wys_nerfstudio.editing.flow_matching import MAX_PIXELS, RELEVANCE_NOISE_LEVEL
from wys_nerfstudio.editing.flux2 import Flux2Editor
from wys_nerfstudio.editing.loading import load_profile
from wys_nerfstudio.editing.precision import in_float32_by_layer
from wys_nerfstudio.editing.sampling import add_noise, edit_seed, seeded_noise
from wys_nerfstudio.evaluation.metrics import psnr
from wys_nerfstudio.utils.errors import WysError

INSTRUCTION = "turn the bear into a panda"
KINDS = ["base", "distilled"]
SIZE = (64, 64)
"""Latents of a picture of one megapixel."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux2")
    return {kind: build_flux2_folder(folder / kind, distilled=kind == "distilled") for kind in KINDS}


@pytest.fixture(scope="module")
def editors(folders: dict[str, Path]) -> dict[str, Flux2Editor]:
    editors = {kind: load_editor(str(folder)) for kind, folder in folders.items()}
    assert all(isinstance(editor, Flux2Editor) and isinstance(editor, Editor) for editor in editors.values())
    return editors  # type: ignore


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["base"], tmp_path / "copy")


def images(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(height))


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# ---------------------------------------------------------------------------------------------------- equality to diffusers


def diffusers_edit(folder: Path, image: torch.Tensor, noise: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
    """Edit by diffusers' pipeline, from pure noise."""
    from diffusers import Flux2KleinPipeline
    from PIL import Image

    pipeline: Any = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    edited = pipeline(
        image=Image.fromarray((image * 255).round().byte().numpy()), prompt=INSTRUCTION, latents=noise[None],
        num_inference_steps=steps, guidance_scale=scale, max_sequence_length=TOKENS, output_type="pt",
        text_encoder_out_layers=(LAYERS // 4, LAYERS // 2, 3 * LAYERS // 4),
    ).images  # fmt: skip
    return edited[0].permute(1, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 112)])
def test_threshold_zero_equals_diffusers_pipeline(folders, editors, kind, height, width):
    editor, image = editors[kind], (images(1, height, width)[0] * 255).round() / 255
    steps, scale = (6, 4.0) if kind == "base" else (4, 1.0)
    options = EditOptions(guidance_scale=scale, diffusion_steps=steps, mask_threshold=0.0)
    edited = edit_image(editor, image, INSTRUCTION, options).edited
    (noise,) = seeded_noise([edit_seed(0, 0)], (16, height // 4, width // 4), editor.device)
    expected = diffusers_edit(folders[kind], image, noise, steps, scale)
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=0)
    assert psnr(edited, image) < 25, "the edit must change the image"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("size", [(64, 64), (16, 40)])
def test_levels_of_a_whole_run_are_those_of_diffusers(editors, kind, steps, size):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    shift = compute_empirical_mu(image_seq_len=size[0] * size[1], num_steps=steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)  # type: ignore
    levels = editors[kind].noise_levels(1.0, steps, size)
    assert [level.noise for level in levels] == scheduler.sigmas.tolist()
    assert all(level.signal == 1 - level.noise and level.time == level.noise for level in levels)


# -------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("strength", [0.02, 0.3, 0.5, 0.77, 0.98])
def test_an_edit_of_a_base_model_starts_where_its_strength_says(editors, strength):
    """At the level that a run of many more steps has after the same share of them."""
    levels = editors["base"].noise_levels(strength, 20, SIZE)
    assert len(levels) - 1 == max(1, round(20 * strength)) and levels[-1].noise == 0
    assert all(a.noise > b.noise for a, b in zip(levels, levels[1:]))
    e = np.exp(-np.log(1 / editors["base"].noise_levels(0.5, 20, SIZE)[0].noise - 1))
    assert levels[0].noise == pytest.approx(e / (e + 1 / strength - 1), abs=1e-6)


@pytest.mark.parametrize(("strength", "steps"), [(0.02, 1), (0.3, 1), (0.5, 2), (0.7, 3), (0.98, 4), (1.0, 4)])
def test_an_edit_of_a_distilled_model_has_only_its_own_levels(editors, strength, steps):
    own = editors["distilled"].noise_levels(1.0, 4, SIZE)
    assert [level.noise for level in own] == pytest.approx([1.0, 0.967, 0.908, 0.767, 0.0], abs=1e-3)
    assert editors["distilled"].noise_levels(strength, 4, SIZE) == own[4 - steps :]


def test_the_level_of_maps(editors):
    """The paper's noise; of a distilled model the nearest of its own levels that has any signal."""
    assert editors["base"].noise_level(RELEVANCE_NOISE_LEVEL, SIZE).noise == RELEVANCE_NOISE_LEVEL
    signal_to_noise = 0.037 / (1 - 0.037)
    assert (0.16 / 0.84) ** 2 == pytest.approx(signal_to_noise, rel=0.07)
    assert editors["distilled"].noise_level(RELEVANCE_NOISE_LEVEL, SIZE).noise == pytest.approx(0.908, abs=1e-3)
    assert editors["distilled"].noise_level(0.999, SIZE).noise < 1


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_is_the_difference_of_two_velocities(editors, kind):
    editor, image, seed = editors[kind], images(1), 7
    (raw,) = relevance_maps(editor, image, INSTRUCTION, seeds=[seed], noise_level=RELEVANCE_NOISE_LEVEL)
    clean = editor.encode(image).latents
    level = editor.noise_level(RELEVANCE_NOISE_LEVEL, (16, 16))
    noisy = add_noise(clean, seeded_noise([seed], clean.shape[1:], editor.device), level)
    with_text, without_text = editor.predictor(clean, INSTRUCTION, WITH_AND_WITHOUT_TEXT)(noisy, level)
    expected = level.signal * (with_text - without_text).abs().mean(dim=1)
    torch.testing.assert_close(raw, expected, rtol=1e-4, atol=1e-7)
    assert raw.shape == (1, 16, 16) and float(raw.std()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_a_batch_do_not_influence_each_other(editors, kind):
    editor, views, starts = editors[kind], images(3), images(3).flip(0)
    mask = torch.zeros(3, 64, 64, dtype=torch.bool)
    mask[:, 16:48, 8:40] = True
    settings = EditOptions(mask_threshold=0.5).resolve(editor.profile.of_scenes)

    def maps_and_edits(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        seeds = [1, 2, 3][part]
        maps = next(relevance_maps(editor, views[part], INSTRUCTION, seeds=seeds))
        arguments = (starts[part], views[part], mask[part], INSTRUCTION, settings)
        return maps, edit_images(editor, *arguments, strength=0.8, seeds=seeds)

    together = maps_and_edits(slice(0, 3))
    single = [torch.cat(parts) for parts in zip(*(maps_and_edits(slice(i, i + 1)) for i in range(3)))]
    torch.testing.assert_close(together[0], single[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(together[1], single[1], rtol=0, atol=1e-4)
    assert torch.equal(together[1][~mask], views[~mask]) and psnr(together[1], views, mask) < 30


# ------------------------------------------------------------------------------------------------- precision and devices


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_maps_of_half_precision_are_computed_in_float32(folders, dtype):
    """They equal those of a float32 editor with the same, rounded weights and text states."""
    half, exact = load_editor(str(folders["base"]), dtype=dtype), load_editor(str(folders["base"]))
    assert isinstance(half, Flux2Editor) and isinstance(exact, Flux2Editor)
    for part in ("transformer", "vae"):
        getattr(exact, part).load_state_dict(getattr(half, part).state_dict())
    for text in (INSTRUCTION, ""):
        exact._texts[text] = half.encode_text(text).float()
    before = [(weight, weight.data_ptr(), weight.clone()) for weight in half.transformer.parameters()]
    results = [next(relevance_maps(editor, images(2), INSTRUCTION, seeds=[1, 2])) for editor in (half, exact)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)
    for weight, address, value in before:
        assert weight.data_ptr() == address and weight.dtype == value.dtype and torch.equal(weight, value)
    assert not any(module._forward_hooks for module in half.transformer.modules())


def test_one_layer_at_a_time_is_cast_to_float32():
    network = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))).bfloat16()
    dtypes: list[list[torch.dtype]] = []
    for layer in network:
        layer.register_forward_hook(lambda *_: dtypes.append([inner.weight.dtype for inner in network]))  # type: ignore
    with in_float32_by_layer(network), in_float32_by_layer(network):
        assert network(torch.rand(2, 4)).dtype == torch.float32
    float32, half = torch.float32, torch.bfloat16
    assert dtypes == [[float32, half, half], [half, float32, half], [half, half, float32]]
    with pytest.raises(RuntimeError), in_float32_by_layer(network):
        network(torch.rand(2, 5))
    assert {weight.dtype for weight in network.parameters()} == {half}


@pytest.mark.parametrize("kind", KINDS)
def test_an_editor_on_the_emulated_gpu_equals_the_cpu(folders, kind):
    results = []
    with emulated_gpu():
        for device in ("cpu", "cuda"):
            editor = load_editor(str(folders[kind]), device, "float32")
            assert isinstance(editor, Flux2Editor)
            maps = next(relevance_maps(editor, images(2), INSTRUCTION, seeds=[1, 2]))
            edited = edit_image(editor, images(1)[0], INSTRUCTION, EditOptions(diffusion_steps=2, mask_threshold=0.2))
            assert all(isinstance(p, OnGpu) == (device == "cuda") for p in editor.transformer.parameters())
            results.append((maps.cpu(), edited.edited.cpu()))
    assert all(map(torch.equal, *results))


def test_the_text_encoder_takes_the_transformers_place_on_the_gpu(folders, monkeypatch):
    """Together, those of klein would need 16 GB."""
    with emulated_gpu():
        editor = load_editor(str(folders["base"]), "cuda")
        assert isinstance(editor, Flux2Editor) and editor.transformer.dtype == torch.bfloat16

        def on_gpu(network: torch.nn.Module) -> set[bool]:
            return {isinstance(weight, OnGpu) for weight in network.parameters()}

        seen, encode = [], editor.text_encoder.forward

        def forward(**inputs: Any) -> Any:
            seen.append((on_gpu(editor.text_encoder), on_gpu(editor.transformer)))
            return encode(**inputs)

        monkeypatch.setattr(editor.text_encoder, "forward", forward)
        states = editor.encode_text("make the ball blue")
        assert seen == [({True}, {False})] and isinstance(states, OnGpu)
        assert on_gpu(editor.text_encoder) == {False} and on_gpu(editor.transformer) == {True}
        assert editor.encode_text("make the ball blue") is states and len(seen) == 1
        with pytest.raises(WysError, match="tokens, but the text encoder"):
            editor.encode_text("ball " * 30)
        assert on_gpu(editor.transformer) == {True}


# ------------------------------------------------------------------------------------------------------ sizes and defaults


@pytest.mark.parametrize(
    ("height", "width", "resolution", "expected"),
    [
        (540, 960, None, (540, 960)),
        (1080, 1920, None, (768, 1364)),
        (1920, 1080, None, (1364, 768)),
        (80, 64, None, (80, 64)),
        (30, 40, None, (64, 84)),
        (540, 960, 512, (288, 512)),
        (1080, 1920, 1920, (1080, 1920)),
    ],
)
def test_images_are_edited_at_their_own_size_up_to_a_megapixel(editors, height, width, resolution, expected):
    size = editors["base"].editing_size(height, width, resolution)
    assert size == expected and all(side % 4 == 0 for side in size)
    assert resolution is not None or size[0] * size[1] <= 1.02 * MAX_PIXELS
    assert editors["base"].latent_size(*size) == (size[0] // 4, size[1] // 4)


def test_defaults_of_base_and_distilled_models(folders, editors):
    for kind, scale, steps in (("base", 4.0, (50, 20)), ("distilled", 1.0, (4, 4))):
        profile = load_profile(str(folders[kind]))
        assert profile == editors[kind].profile and profile.half_precision == "bfloat16"
        for defaults, count in zip((profile.of_images, profile.of_scenes), steps):
            assert (defaults.guidance_scale, defaults.image_guidance_scale) == (scale, 1.0)
            assert (defaults.diffusion_steps, defaults.relevance_noise_level) == (count, RELEVANCE_NOISE_LEVEL)


def test_typed_options_replace_the_defaults_of_the_editor(editors):
    settings = EditOptions(guidance_scale=2.0, mask_threshold=0.3).resolve(editors["base"].profile.of_images)
    assert isinstance(settings, EditSettings)
    assert (settings.guidance_scale, settings.diffusion_steps, settings.mask_threshold) == (2.0, 50, 0.3)
    assert settings.resolve(editors["distilled"].profile.of_images) == settings


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("base", {"image_guidance_scale": 1.5}, "has no image guidance: leave out --image-guidance-scale"),
        ("base", {"image_guidance_scale": 1.5}, "not 1.5. --guidance-scale and --mask-threshold apply."),
        ("distilled", {"image_guidance_scale": 0.0}, "not 0. --mask-threshold applies."),
        (
            "distilled",
            {"guidance_scale": 7.5},
            "is distilled to run without guidance: leave out --guidance-scale, or give it",
        ),
        ("distilled", {"guidance_scale": 7.5}, "not 7.5. --mask-threshold and --diffusion-steps apply."),
    ],
)
def test_guidance_that_means_nothing_is_refused(editors, kind, options, sentence):
    with pytest.raises(WysError) as error:
        edit_image(editors[kind], images(1)[0], INSTRUCTION, EditOptions(**options))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"_class_name": "DDIMScheduler"}, "uses DDIMScheduler, which is not supported. Supported: FlowMatchEuler"),
        ({"_class_name": None}, "uses an unnamed scheduler, which is not supported"),
        ({"use_karras_sigmas": True}, "uses FlowMatchEulerDiscreteScheduler with use_karras_sigmas, which is not"),
        ({"num_train_timesteps": 500}, "has 500 as num_train_timesteps: supported is 1000"),
    ],
)
def test_other_noise_schedules_are_refused(copy, entries, sentence):
    change(copy / "scheduler" / "scheduler_config.json", **entries)
    with pytest.raises(WysError, match=sentence):
        load_editor(str(copy))


def test_parts_that_do_not_fit_are_refused(copy, tmp_path):
    other = build_flux2_folder(tmp_path / "other", latent_channels=2)
    shutil.rmtree(copy / "vae")
    shutil.copytree(other / "vae", copy / "vae")
    with pytest.raises(WysError, match="takes 16 channels, not the 8 of 2x2 latents of its VAE: download it again"):
        load_editor(str(copy))


def test_a_text_encoder_of_another_width_is_refused(copy, tmp_path):
    other = build_flux2_folder(tmp_path / "other", text_width=32)
    shutil.rmtree(copy / "text_encoder")
    shutil.copytree(other / "text_encoder", copy / "text_encoder")
    with pytest.raises(
        WysError, match="takes text states of width 48, which layers of width 32 of its text encoder do not"
    ):
        load_editor(str(copy))


def test_a_tokenizer_without_a_chat_template_is_refused(copy):
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(WysError, match="is incomplete, or has no chat template: download it again"):
        load_editor(str(copy))


def test_words_outside_the_vocabulary_are_refused(tmp_path):
    editor = load_editor(str(build_flux2_folder(tmp_path / "words", unknown_token="<unknown>")))
    with pytest.raises(
        WysError, match='"turn the fox red" has words that the editor .* its words are: a, ball, bear, '
    ):
        editor.encode_text("turn the fox red")
    assert editor.encode_text("turn the bear red").shape == (1, TOKENS, 48)


def test_missing_parts_are_named(copy):
    shutil.rmtree(copy / "transformer")
    with pytest.raises(
        WysError, match="has no transformer: --editor needs a checkpoint in diffusers format, with the folders"
    ):
        load_editor(str(copy))


def test_an_older_diffusers_is_named(folders, monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", "0.36.0")
    with pytest.raises(
        WysError, match=r"is a FLUX.2 klein, which diffusers 0.36.0 does not support: pip install -U diffusers"
    ):
        load_editor(str(folders["base"]))


def test_weights_that_are_not_finite_are_named(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(WysError, match="The transformer of the editor .* computes NaN or Inf"):
        load_editor(str(copy))
