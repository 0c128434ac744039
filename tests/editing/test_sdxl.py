"""InstructPix2Pix of Stable Diffusion XL, with tiny random networks, compared with diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_editor_folder

from wys_nerfstudio.editing import EditSettings, edit_image, load_editor, relevance_maps
from wys_nerfstudio.editing.sampling import edit_seed, seeded_noise
from wys_nerfstudio.editing.sdxl import SdxlEditor
from wys_nerfstudio.evaluation.metrics import psnr
from wys_nerfstudio.utils.errors import WysError

INSTRUCTION = "turn the bear into a panda"


def build_sdxl_folder(folder: Path, *, empty_text_is_zero: bool = True) -> Path:
    """Write an untrained SDXL InstructPix2Pix with the layout and class names of the public repositories."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    build_editor_folder(folder)
    torch.manual_seed(1)
    UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=80, attention_head_dim=8, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8, use_linear_projection=True,
    ).save_pretrained(folder / "unet")  # fmt: skip
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    shared = {key: config[key] for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")}
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    CLIPTextModel(CLIPTextConfig(**shared, **sizes, hidden_size=32)).save_pretrained(folder / "text_encoder")
    second = CLIPTextConfig(**shared, **sizes, hidden_size=48, projection_dim=24)
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionXLInstructPix2PixPipeline",
        "force_zeros_for_empty_prompt": empty_text_is_zero,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    for part in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        index.pop(part)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl_folder(tmp_path_factory.mktemp("sdxl") / "editor")


def diffusers_edit(folder: Path, editor: SdxlEditor, image: torch.Tensor, settings: EditSettings) -> torch.Tensor:
    from diffusers import DDIMScheduler, StableDiffusionXLInstructPix2PixPipeline

    pipeline: Any = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(folder, add_watermarker=False)
    # With these options the timesteps are equal: 999, 666, 333.
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        timestep_spacing="leading",
        steps_offset=333,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    clean = editor.encode(image[None]).latents
    noise = seeded_noise([edit_seed(0, 0)], clean.shape[1:], editor.device)
    alpha = editor.alphas_cumprod[-1]
    edited = pipeline(
        prompt=INSTRUCTION, image=image[None].permute(0, 3, 1, 2), height=image.shape[0], width=image.shape[1],
        num_inference_steps=3, guidance_scale=settings.guidance_scale, image_guidance_scale=settings.image_guidance_scale,
        negative_prompt=None, latents=alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, output_type="pt",
    ).images  # fmt: skip
    assert pipeline.scheduler.timesteps.tolist() == [999, 666, 333]
    return edited[0].permute(1, 2, 0)


@pytest.mark.parametrize("empty_text_is_zero", [True, False])
def test_threshold_zero_equals_diffusers_sdxl_pipeline(tmp_path: Path, empty_text_is_zero: bool) -> None:
    folder = build_sdxl_folder(tmp_path / "editor", empty_text_is_zero=empty_text_is_zero)
    editor = load_editor(str(folder))
    assert isinstance(editor, SdxlEditor) and editor.empty_text_is_zero is empty_text_is_zero
    image = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    settings = EditSettings(7.5, 1.5, 3, mask_threshold=0.0)
    edited = edit_image(editor, image, INSTRUCTION, settings).edited
    expected = diffusers_edit(folder, editor, image, settings)
    assert psnr(edited, expected) > 40
    assert psnr(edited, image) < 30, "the edit must change the image"


def test_zero_and_encoded_empty_text_give_different_maps(folder: Path, tmp_path: Path) -> None:
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    zero, encoded = (
        load_editor(str(path)) for path in (folder, build_sdxl_folder(tmp_path / "e", empty_text_is_zero=False))
    )
    assert not zero.encode_text("").any() and encoded.encode_text("").any()
    assert torch.equal(zero.encode_text(INSTRUCTION), encoded.encode_text(INSTRUCTION))
    first, second = (next(relevance_maps(e, images, INSTRUCTION, seeds=[1, 2])) for e in (zero, encoded))
    assert first.shape == (2, 8, 8) and not torch.allclose(first, second)


@pytest.mark.parametrize(("height", "width"), [(36, 64), (20, 28), (64, 36)])
def test_sides_are_whole_latents(folder: Path, height: int, width: int) -> None:
    editor = load_editor(str(folder))
    assert editor.editing_size(height, width, max(height, width)) == (height, width)
    image = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(0))
    output = edit_image(editor, image, INSTRUCTION, EditSettings(diffusion_steps=2, mask_threshold=0.0, resolution=64))
    assert output.edited.shape == image.shape and (output.edited != image).any()


def test_the_unet_is_conditioned_on_the_image_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, calls = load_editor(str(folder)), []
    forward = editor.unet.forward
    monkeypatch.setattr(
        editor.unet, "forward", lambda *args, **kwargs: (calls.append(kwargs), forward(*args, **kwargs))[1]
    )
    latents = torch.zeros(2, 4, 6, 8)
    editor.predict(latents, editor.noise_level(0.5, (8, 8)), latents, editor.encode_text(INSTRUCTION).expand(2, -1, -1))
    (kwargs,) = calls
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]] * 2
    assert kwargs["added_cond_kwargs"]["text_embeds"].shape == (2, 24)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_part_is_reported(folder: Path, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / part)
    with pytest.raises(WysError, match=f"has no {part}: --editor needs"):
        load_editor(str(copy))


def test_an_sdxl_editor_without_model_index_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model_index.json").unlink()
    with pytest.raises(WysError, match="other than text .text_time.*or of SDXL with its model_index.json"):
        load_editor(str(copy))


def test_a_unet_with_other_conditions_is_refused(folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "unet" / "config.json").read_text())
    config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 8, "encoder_hid_dim": 80}
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    with pytest.raises(WysError, match="is not one of SDXL: its addition_embed_type is text, not text_time"):
        load_editor(str(copy))


def test_a_second_pickled_text_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (weights,) = (copy / "text_encoder_2").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(WysError, match="has its text_encoder_2 as a pickle"):
        load_editor(str(copy))
