"""Loading of editors: sources, files read, refusals, instructions, full-size networks on the meta device."""

import json
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import build_editor_folder
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.editing import EMBEDDED, Editor, EditSettings, edit_image, load_editor
from wys_nerfstudio.editing.loading import FAMILIES, editor_source, load_profile, resolve_dtype
from wys_nerfstudio.editing.stable_diffusion import PARTS, SCHEDULERS, StableDiffusionEditor, known_punctuation
from wys_nerfstudio.utils.errors import WysError


@pytest.fixture
def copy(editor_folder: Path, tmp_path: Path) -> Path:
    """A copy of the untrained editor that tests may modify."""
    return shutil.copytree(editor_folder, tmp_path / "editor")


def test_editors_are_loaded_frozen_in_eval_mode_in_fp32(editor_folder):
    editor = load_editor(str(editor_folder))
    assert editor.name == str(editor_folder)
    assert editor.device == torch.device("cpu")
    for network in (editor.unet, editor.vae, editor.text_encoder):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_the_noise_schedule_is_that_of_the_scheduler_config(editor_folder):
    editor = load_editor(str(editor_folder))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(editor.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-5, rtol=1e-4)
    assert editor.num_train_timesteps == 1000
    assert float(editor.final_alpha) == 1
    assert editor.prediction_type == "epsilon"


def test_only_five_parts_are_read(copy):
    for part in ("safety_checker", "feature_extractor"):
        (copy / part).mkdir()
        for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (copy / part / file).write_text("this is broken")
    shutil.rmtree(copy / "raw_tokenizer")
    editor = load_editor(str(copy))
    assert sorted(PARTS) == ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert editor.encode_text("make it red").shape == (1, 40, 32)


def test_loading_does_not_modify_the_folder(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    load_editor(str(copy))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_reported(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(
        WysError, match=f'editor folder "{copy}" has no {part}: --editor needs a checkpoint in diffusers format'
    ):
        load_editor(str(copy))


def test_all_missing_parts_are_reported_together(copy):
    shutil.rmtree(copy / "unet")
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(WysError, match="has no unet and no scheduler"):
        load_editor(str(copy))


def test_other_checkpoints_than_instruct_pix2pix_are_refused(tmp_path):
    folder = build_editor_folder(tmp_path / "plain", in_channels=4)
    with pytest.raises(
        WysError, match="is not an InstructPix2Pix checkpoint: its UNet takes 4 input channels, not 8.*--editor"
    ):
        load_editor(str(folder))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "Flux2Pipeline", "LatentConsistencyModelPipeline"])
def test_unsupported_pipeline_classes_are_refused(copy, kind):
    edit_json(copy / "model_index.json", _class_name=kind)
    with pytest.raises(WysError, match=f"is a {kind}, which is not supported. Supported: {', '.join(FAMILIES)}.$"):
        load_editor(str(copy))


def test_an_index_without_a_class_is_refused(copy):
    (copy / "model_index.json").write_text("{}")
    with pytest.raises(WysError, match="is a pipeline without a class name, which is not supported"):
        load_editor(str(copy))


def test_an_index_that_is_not_an_object_is_refused(copy):
    (copy / "model_index.json").write_text("[]")
    with pytest.raises(WysError, match="could not be loaded from its folder: model_index.json is not a JSON object"):
        load_editor(str(copy))


def test_editors_without_an_index_are_stable_diffusion(copy):
    (copy / "model_index.json").unlink()
    assert type(load_editor(str(copy))) is StableDiffusionEditor


UNSUPPORTED = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler"]


@pytest.mark.parametrize("kind", [*UNSUPPORTED, "NoSuchScheduler"])
def test_unsupported_schedulers_are_refused(copy, kind):
    edit_json(copy / "scheduler" / "scheduler_config.json", _class_name=kind)
    with pytest.raises(WysError, match=f"uses {kind}, which is not supported. Supported: {', '.join(SCHEDULERS)}.$"):
        load_editor(str(copy))


def test_a_scheduler_without_a_class_is_refused(copy):
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(WysError, match="uses an unnamed scheduler, which is not supported"):
        load_editor(str(copy))


def test_continuous_timesteps_are_refused(copy):
    edit_json(copy / "scheduler" / "scheduler_config.json", timestep_type="continuous")
    with pytest.raises(WysError, match="EulerAncestralDiscreteScheduler with continuous timesteps, which is not supp"):
        load_editor(str(copy))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_supported_schedulers_have_equal_noise_schedules(copy, editor_folder, kind):
    import diffusers

    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, kind)(**schedule)
    shutil.rmtree(copy / "scheduler")
    scheduler.save_pretrained(copy / "scheduler")
    loaded, expected = (load_editor(str(folder)) for folder in (copy, editor_folder))
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert loaded.noise_levels(1.0, 20, (8, 8))[:-1] == expected.noise_levels(1.0, 20, (8, 8))[:-1]


def test_editors_implement_the_protocol(editor_folder):
    assert isinstance(load_editor(str(editor_folder)), Editor)


def test_sample_prediction_is_refused(copy):
    edit_json(copy / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(
        WysError, match="has the prediction type sample, which is not supported. Supported: epsilon, v_prediction"
    ):
        load_editor(str(copy))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "missing", "a/b/c", "~/no/such/editor"])
def test_missing_folders_are_refused(name):
    with pytest.raises(WysError, match=f'no editor folder "{name}": give --editor a folder.*hub id.*"embedded"'):
        load_editor(name)


def test_hub_ids_are_not_changed():
    assert editor_source("timbrooks/instruct-pix2pix") == "timbrooks/instruct-pix2pix"


def test_the_embedded_editor_is_part_of_the_package():
    import wys_nerfstudio

    folder = Path(wys_nerfstudio.__file__).parent / "demo" / "editor"
    if folder.is_dir():
        assert editor_source(EMBEDDED) == str(folder)
    else:
        with pytest.raises(WysError, match='no editor folder "embedded"'):
            editor_source(EMBEDDED)


def test_a_hub_id_without_a_network_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = (
        'editor "nobody/no-such-editor" is not downloaded, and the Hugging Face hub cannot be reached: .*"embedded"'
    )
    with pytest.raises(WysError, match=message):
        load_editor("nobody/no-such-editor")


def test_the_hub_is_tried_once_without_retries(tmp_path, monkeypatch):
    attempts = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            attempts.append(timeout)
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    with pytest.raises(WysError, match="is not downloaded, and the Hugging Face hub cannot be reached"):
        load_editor("nobody/no-such-editor")
    assert len(attempts) == 1 and attempts[0] <= 5


def test_downloaded_editors_are_loaded_without_a_network(editor_folder, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--editor"
    shutil.copytree(editor_folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_editor("someone/editor").name == "someone/editor"


PICKLES = [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")]


@pytest.mark.parametrize(("part", "name"), PICKLES)
def test_pickled_weights_are_read_only_if_allowed(copy, editor_folder, part, name):
    from safetensors.torch import load_file

    (weights,) = (copy / part).glob("*.safetensors")
    torch.save(load_file(weights), copy / part / f"{name}.bin")
    weights.unlink()
    with pytest.raises(WysError, match=f"has its {part} as a pickle .*--pipeline.editor-allow-pickle True"):
        load_editor(str(copy))
    expected, loaded = (
        getattr(load_editor(str(f), allow_pickle=True), part).state_dict() for f in (editor_folder, copy)
    )
    assert expected and all(torch.equal(expected[key], loaded[key]) for key in expected)


@pytest.mark.parametrize(("part", "name"), PICKLES)
def test_pickles_that_execute_code_are_refused(copy, tmp_path, part, name):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "proof"),)

    (weights,) = (copy / part).glob("*.safetensors")
    weights.unlink()
    torch.save({"weight": Malicious()}, copy / part / f"{name}.bin")
    with pytest.raises(WysError, match="could not be loaded from its folder"):
        load_editor(str(copy), allow_pickle=True)
    assert not (tmp_path / "proof").exists()


SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
TEXT = "text_encoder/config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (SCHEDULER, {"num_train_timesteps": 0}, "has 0 as num_train_timesteps: supported are 2 to 100000"),
        (SCHEDULER, {"num_train_timesteps": "1000"}, 'has "1000" as num_train_timesteps'),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "as num_train_timesteps"),
        (SCHEDULER, {"beta_start": None}, "has no beta_start: its noise schedule is unknown"),
        (SCHEDULER, {"beta_start": "0.1"}, "could not be loaded from its folder: TypeError"),
        (SCHEDULER, {"beta_start": -0.5}, "could not be loaded|does not decrease"),
        (SCHEDULER, {"beta_schedule": "odd"}, "could not be loaded from its folder: odd is not implemented"),
        (
            SCHEDULER,
            {"trained_betas": [0.1, 0.1, 2.0]},
            "noise schedule of the editor .* does not decrease from 1 to 0",
        ),
        (SCHEDULER, {"use_flow_sigmas": True}, "with flow matching .use_flow_sigmas., which is not supported"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "last timestep has no signal .* Supported with it: v_prediction"),
        (UNET, {"quantization_config": {"quant_method": "bitsandbytes"}}, "unet of the editor .* is quantized"),
        (UNET, {"layers_per_block": 2}, "unet of the editor .* lacks the weights down_blocks"),
        (UNET, {"cross_attention_dim": 16}, "unet .* has weights of another size than its config.json: .*attn2"),
        (UNET, {"norm_num_groups": 0}, "could not be loaded from its folder: ZeroDivisionError"),
        (UNET, {"sample_size": None}, "UNet of the editor .* has the sample_size null, not a positive number"),
        (VAE, {"scaling_factor": None}, "VAE of the editor .* has the scaling_factor null, not a positive number"),
        (VAE, {"scaling_factor": float("nan")}, "scaling_factor NaN, not a positive number"),
        (TEXT, {"num_hidden_layers": 1}, "text_encoder .* has weights for more layers than its config.json"),
        (TEXT, {"max_position_embeddings": "40"}, "could not be loaded from its folder"),
    ],
)
def test_broken_configs_are_refused(copy, file, changes, message):
    edit_json(copy / file, **changes)
    with pytest.raises(WysError, match=message):
        load_editor(str(copy))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_refused(copy, part):
    from safetensors.torch import load_file, save_file

    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    name = "final_layer_norm.weight" if part == "text_encoder" else min(weights)
    (key,) = (key for key in weights if key.endswith(name))
    save_file({other: weights[other] for other in weights if other != key}, file, {"format": "pt"})
    with pytest.raises(WysError, match=f"The {part} of the editor .* lacks the weights .*{name}. Download it again"):
        load_editor(str(copy))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_not_finite_are_refused(copy, part):
    from safetensors.torch import load_file, save_file

    (file,) = (copy / part).glob("*.safetensors")
    save_file({key: value * float("nan") for key, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(WysError, match=f"The {part} of the editor .* computes NaN or Inf: its weights are damaged"):
        load_editor(str(copy))


def test_configs_load_no_attention_kernel(copy, monkeypatch):
    from transformers import modeling_utils

    edit_json(copy / TEXT, _attn_implementation="someone/attention", auto_map={"AutoModel": "code.Model"})
    (copy / "text_encoder" / "code.py").write_text("raise SystemExit")
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("code was loaded"))
    assert load_editor(str(copy)).text_encoder.config._attn_implementation == "sdpa"


def test_v_prediction_without_signal_gives_edits(copy):
    edit_json(
        copy / SCHEDULER, _class_name="DDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    editor = load_editor(str(copy))
    assert editor.noise_levels(1.0, 10, (8, 8))[0].signal == 0
    assert editor.noise_level(0.9999, (8, 8)).signal > 0
    settings = EditSettings(diffusion_steps=10, mask_threshold=0.0)
    edited = edit_image(editor, torch.full((32, 32, 3), 0.5), "make it red", settings).edited
    assert edited.isfinite().all() and edited.std() > 0.01


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_refused(copy, part):
    (weights,) = (copy / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(WysError, match="could not be loaded from its folder.*--editor"):
        load_editor(str(copy))


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_damaged_configs_are_refused(copy, file):
    (copy / file).write_text("{")
    with pytest.raises(WysError, match="could not be loaded from its folder.*--editor"):
        load_editor(str(copy))


def test_loading_restores_the_log_level_of_diffusers(editor_folder, copy):
    from diffusers.utils import logging

    shutil.rmtree(copy / "unet")
    (copy / "unet").mkdir()
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        load_editor(str(editor_folder))
        assert logging.get_verbosity() == logging.INFO
        with pytest.raises(WysError):
            load_editor(str(copy))
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)


def test_precisions_are_resolved():
    profile = load_profile("embedded")
    assert resolve_dtype("auto", "cpu", profile) == "float32"
    assert resolve_dtype("auto", "cuda:1", profile) == "float16"
    assert resolve_dtype("auto", torch.device("cuda"), replace(profile, half_precision="bfloat16")) == "bfloat16"
    assert resolve_dtype("float16", "cpu", profile) == "float16"
    assert resolve_dtype("bfloat16", "cuda:1", profile) == "bfloat16"
    assert resolve_dtype("float32", torch.device("cuda"), profile) == "float32"


def test_networks_use_the_dtype_and_results_are_fp32(editor_folder):
    editor = load_editor(str(editor_folder), dtype="bfloat16")
    assert {n.dtype for n in (editor.unet, editor.vae, editor.text_encoder)} == {torch.bfloat16}
    assert editor.alphas_cumprod.dtype == torch.float32
    latents = editor.encode(torch.rand(1, 16, 24, 3)).latents
    assert (latents.dtype, latents.shape) == (torch.float32, (1, 4, 4, 6))
    noise = editor.predict(latents, editor.noise_level(0.01, (8, 8)), latents, editor.encode_text("make it red"))
    assert (noise.dtype, noise.shape) == (torch.float32, latents.shape)
    assert (editor.decode(latents).dtype, editor.decode(latents).shape) == (torch.float32, (1, 16, 24, 3))


# ------------------------------------------------------------------------------------------------------------ instructions


@pytest.fixture(scope="module")
def editor(editor_folder: Path) -> StableDiffusionEditor:
    return load_editor(str(editor_folder))


def test_overlong_instructions_are_refused(editor):
    # 38 letters are 38 tokens with this tokenizer, plus start and end tokens.
    assert editor.encode_text("a " * 38).shape == (1, 40, 32)
    with pytest.raises(WysError, match="instruction has 41 tokens, but the text encoder.*takes at most 40: shorten it"):
        editor.encode_text("a " * 39)


def test_text_encodings_are_distinct_and_reproducible(editor):
    texts = ["make the bear red", "make the ball red", ""]
    first = [editor.encode_text(text) for text in texts]
    assert all(torch.equal(editor.encode_text(text), states) for text, states in zip(texts, first))
    assert not any(torch.allclose(first[i], first[j], atol=1e-3) for i, j in [(0, 1), (0, 2), (1, 2)])


def whole_word_editor(editor: StableDiffusionEditor, folder: Path) -> StableDiffusionEditor:
    """Return the editor with a tokenizer whose vocabulary is four whole words and their pieces."""
    from transformers import CLIPTokenizer

    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|unknown|>"}
    words, merges = {value: i for i, value in enumerate(special.values())}, []
    for word in ("make", "it", "red", "blue"):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = [pieces[0] + pieces[1]]
            words.setdefault(pieces[0], len(words))
        for letter in (*word[:-1], f"{word[-1]}</w>"):
            words.setdefault(letter, len(words))
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = CLIPTokenizer(*files, **special, pad_token="<|endoftext|>", model_max_length=40)
    return replace(editor, tokenizer=tokenizer)


def test_unknown_words_of_whole_word_tokenizers_are_refused(editor, tmp_path):
    limited = whole_word_editor(editor, tmp_path)
    assert limited.encode_text("make it red").shape == (1, 40, 32)
    assert limited.encode_text("").shape == (1, 40, 32)
    # The letters of "tired" are pieces of known words.
    for instruction in ("make it zzz", "make it tired"):
        sentence = f'"{instruction}" has words that the editor .* was not trained on; its words are: (a, )?([a-z]{{2,}}, )*[a-z]{{2,}}[.]'
        with pytest.raises(WysError, match=f"{sentence} .*--editor timbrooks/"):
            limited.encode_text(instruction)


def test_punctuation_of_whole_word_tokenizers_is_ignored(editor, tmp_path):
    limited = whole_word_editor(editor, tmp_path)
    expected = limited.encode_text("make it red")
    for instruction in ("make it red!!", "make it, red...", '"make it" (red)?!', "make it\u2026 red;", "make-it-red"):
        assert torch.equal(limited.encode_text(instruction), expected)
    with pytest.raises(WysError, match="has words that the editor"):
        limited.encode_text("make it red + blue")


def test_known_punctuation_is_kept_once():
    vocabulary = {"!</w>", "don</w>", "'t</w>"}
    assert known_punctuation("don't make it 'red'!!?", vocabulary) == "don't make it  red!"
    assert known_punctuation("'red':", vocabulary) == " red "


def test_the_embedded_editor_takes_exclamations():
    assert torch.equal(load_embedded().encode_text("make it red!!"), load_embedded().encode_text("make it red!"))


def test_subword_tokenizers_accept_any_word(editor):
    assert editor.encode_text("make it zzz").shape == (1, 40, 32)


# --------------------------------------------------------------------------------------------- the full-size architecture


@pytest.fixture(scope="module")
def full_size() -> StableDiffusionEditor:
    """timbrooks/instruct-pix2pix on the meta device: shapes without weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=8,
            cross_attention_dim=768,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=256,
        )
    alphas_cumprod = torch.linspace(1, 0, 1000)
    return StableDiffusionEditor("full", unet, vae, None, None, alphas_cumprod, alphas_cumprod[0], "epsilon")


def test_the_full_size_editor_has_stable_diffusions_geometry(full_size):
    assert sum(p.numel() for p in full_size.unet.parameters()) == 859_532_484
    assert (full_size.latent_factor, full_size.native_resolution) == (8, 512)
    assert full_size.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1080, 1920, (288, 512)),
        (1920, 1080, (512, 288)),
        (512, 512, (512, 512)),
        (994, 738, (512, 384)),
        (100, 4000, (16, 512)),
    ],
)
def test_editing_sizes_of_the_full_size_editor(full_size, height, width, expected):
    assert full_size.editing_size(height, width, None) == expected


ASPECT_RATIOS = [(16, 9), (3, 2), (4, 3), (9, 16), (1, 1), (21, 9)]


@pytest.mark.parametrize(("width", "height"), ASPECT_RATIOS)
@pytest.mark.parametrize(
    ("size", "resolution"),
    [("embedded", 80), ("embedded", 128), ("full", 256), ("full", 512), ("full", 768), ("full", 1024)],
)
def test_editing_sizes_keep_common_proportions(full_size, width, height, size, resolution):
    editor = full_size if size == "full" else load_embedded()
    edited_height, edited_width = editor.editing_size(120 * height, 120 * width, resolution)
    squeeze = (edited_width / edited_height) / (width / height)
    assert max(squeeze, 1 / squeeze) <= 1.02
    assert edited_height % editor.latent_factor == edited_width % editor.latent_factor == 0
    assert resolution * 7 // 8 - editor.latent_factor <= max(edited_height, edited_width) <= resolution


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(8, 1024))
def test_editing_sizes_are_whole_latents_within_the_resolution(height, width, resolution):
    editor = load_embedded()
    edited_height, edited_width = editor.editing_size(height, width, resolution)
    assert edited_height % 4 == edited_width % 4 == 0 and min(edited_height, edited_width) >= 4
    assert max(edited_height, edited_width) <= max(4, resolution + 2)
    assert (edited_height >= edited_width) == (height >= width) or edited_height == edited_width


@cache
def load_embedded() -> StableDiffusionEditor:
    return load_editor(EMBEDDED)  # type: ignore


@pytest.mark.parametrize(("width", "height"), ASPECT_RATIOS)
def test_shapes_of_the_full_size_networks(full_size, width, height):
    height, width = full_size.editing_size(120 * height, 120 * width, 512)
    with torch.device("meta"):
        latents = full_size.encode(torch.rand(2, height, width, 3)).latents
        assert latents.shape == (2, 4, height // 8, width // 8)
        noise = full_size.predict(latents, full_size.noise_level(0.5, (8, 8)), latents, torch.rand(2, 77, 768))
        assert noise.shape == latents.shape
        assert full_size.decode(latents).shape == (2, height, width, 3)
    assert noise.device.type == "meta"


@pytest.mark.parametrize(("width", "height"), ASPECT_RATIOS)
def test_the_embedded_editor_edits_common_proportions(width, height):
    image = torch.rand(12 * height, 12 * width, 3, generator=torch.Generator().manual_seed(0))
    settings = EditSettings(diffusion_steps=2, mask_threshold=0.0)
    output = edit_image(load_embedded(), image, "turn the bear into a panda", settings)
    assert output.edited.shape == image.shape and (output.edited != image).any()


def test_the_native_resolution_is_the_longer_sample_size(full_size):
    from types import SimpleNamespace

    config = SimpleNamespace(sample_size=(48, 80), block_out_channels=(1, 1, 1))
    editor = replace(full_size, unet=SimpleNamespace(config=config))
    assert editor.native_resolution == 640


def test_weights_named_by_earlier_releases_are_loaded(copy, editor_folder):
    """As in timbrooks/instruct-pix2pix: old attention names in the VAE, position ids and a prefix in the text encoder."""
    from safetensors.torch import load_file, save_file

    (file,) = (copy / "vae").glob("*.safetensors")
    renamed, old_names = {}, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key, value in load_file(file).items():
        name = key
        for new, old in old_names.items() if "attentions" in key else ():
            name = name.replace(new, old)
        renamed[name] = value
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, file, {"format": "pt"})
    (file,) = (copy / "text_encoder").glob("*.safetensors")
    text = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file({**text, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    old, new = load_editor(str(copy)), load_editor(str(editor_folder))
    for part in ("vae", "text_encoder"):
        states = [getattr(editor, part).state_dict() for editor in (old, new)]
        assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
