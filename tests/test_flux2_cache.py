"""The benchmark's steps of FLUX.2 klein that compute the mask's tokens only: exact where nothing else has changed, and cheaper."""

import sys
from pathlib import Path

import pytest
import torch
from flux2_folder import build_flux2_folder

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from flux2_cache import RegionEditor
from meta_device import operation_counter

from wys_nerfstudio import relevance
from wys_nerfstudio.editing import EditSettings, edit_images, load_editor
from wys_nerfstudio.editing.editor import Predictor
from wys_nerfstudio.editing.flux2 import Flux2Editor

INSTRUCTION = "turn the bear into a panda"
SETTINGS = EditSettings(guidance_scale=4.0, image_guidance_scale=1.0, diffusion_steps=6)


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Flux2Editor:
    editor = load_editor(str(build_flux2_folder(tmp_path_factory.mktemp("flux2"))))
    assert isinstance(editor, Flux2Editor)
    for name, weight in editor.transformer.named_parameters():
        if "to_out" in name or "to_add_out" in name or "to_qkv_mlp_proj" in name:
            weight.mul_(4)  # or the tokens of an untrained transformer hardly depend on each other
    return editor


@pytest.fixture
def condition() -> torch.Tensor:
    return torch.randn(2, 16, 8, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def region() -> torch.Tensor:
    region = torch.zeros(2, 8, 10, dtype=torch.bool)
    region[0, 2:4, 3:6] = region[1, 5:, :4] = True
    return region


def predictors(editor: Flux2Editor, condition, region, full_pass_every: int) -> tuple[Predictor, Predictor]:
    """Predictors of the whole images and of the region."""
    branches = editor.branches(4.0, 1.0)
    regional = RegionEditor(editor, region, full_pass_every)
    return editor.predictor(condition, INSTRUCTION, branches), regional.predictor(condition, INSTRUCTION, branches)


def test_region_is_exact_where_nothing_has_changed_outside(editor, condition, region):
    whole, regional = predictors(editor, condition, region, 5)
    noise, level = (
        torch.randn(condition.shape, generator=torch.Generator().manual_seed(1)),
        editor.noise_level(0.7, (8, 10)),
    )
    first, again = regional(noise, level), regional(noise, level)
    computed = relevance.dilate(region)[:, None].expand_as(noise)
    for expected, all_tokens, inside in zip(whole(noise, level), first, again):
        assert torch.equal(all_tokens, expected)
        torch.testing.assert_close(inside[computed], expected[computed], atol=1e-5, rtol=1e-5)
        assert not inside[~computed].any() and expected[~computed].all()


def test_region_depends_on_its_own_latents_and_on_the_first_steps(editor, condition, region):
    whole, regional = predictors(editor, condition, region, 3)
    levels = editor.noise_levels(1.0, 6, (8, 10))
    latents = torch.randn(len(levels), *condition.shape, generator=torch.Generator().manual_seed(2))
    errors = []
    for step, level in enumerate(levels[:-1]):
        exact, approximate = whole(latents[step], level)[0], regional(latents[step], level)[0]
        inside = region[:, None].expand_as(exact)
        errors.append(float((approximate - exact)[inside].norm() / exact[inside].norm()))
    assert errors[0] == errors[3] == 0, "whole passes are exact"
    assert all(1e-4 < error < 0.5 for error in [*errors[1:3], *errors[4:]]), errors


def edit(editor: Flux2Editor, images, masks, full_pass_every: int, seeds: list[int]) -> torch.Tensor:
    """Edit images in their masks by a run of 6 steps from pure noise."""
    region = relevance.latent_mask(masks, *editor.latent_size(*masks.shape[1:]))
    regional = RegionEditor(editor, region, full_pass_every)
    return edit_images(regional, images, images, masks, INSTRUCTION, SETTINGS, strength=1.0, seeds=seeds)


def test_edits_with_every_pass_whole_are_exact(editor):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 8:40, 16:48] = True

    exact, whole, approximate = (
        edit_images(editor, image, image, mask, INSTRUCTION, SETTINGS, strength=1.0, seeds=[0]),
        *(edit(editor, image, mask, every, [0]) for every in (1, 3)),
    )
    assert torch.equal(exact, whole)
    assert torch.equal(exact[~mask], approximate[~mask])
    change = (exact - image)[mask].square().mean().sqrt()
    assert 1e-4 < (exact - approximate)[mask].square().mean().sqrt() < 0.2 * change


def test_views_with_different_masks_are_edited_as_one_by_one(editor):
    images = torch.rand(2, 64, 80, 3, generator=torch.Generator().manual_seed(4))
    masks = torch.zeros(2, 64, 80, dtype=torch.bool)
    masks[0, 8:24, 8:24] = masks[1, 30:, 20:70] = True
    together = edit(editor, images, masks, 3, [5, 6])
    for i, seed in enumerate((5, 6)):
        one = slice(i, i + 1)
        alone = edit(editor, images[one], masks[one], 3, [seed])
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=0)


def test_a_region_step_computes_its_tokens_only(editor, condition, region):
    whole, regional = predictors(editor, condition[:1], region[:1], 9)
    noise, level = torch.randn(1, 16, 8, 10), editor.noise_level(0.7, (8, 10))
    regional(noise, level)
    flops = []
    for predict in (whole, regional):
        with operation_counter() as counter:
            predict(noise, level)
        flops.append(counter.get_total_flops())
    text, tokens = editor.encode_text("").shape[1], int(relevance.dilate(region[:1]).sum())
    assert flops[1] / flops[0] == pytest.approx(tokens / (text + 2 * 80), rel=0.25)


def test_attention_of_the_transformer_is_restored(editor, condition, region):
    def processors() -> list[type]:
        blocks = [*editor.transformer.transformer_blocks, *editor.transformer.single_transformer_blocks]
        return [type(block.attn.processor) for block in blocks]

    before, level = processors(), editor.noise_level(0.7, (8, 10))
    _, regional = predictors(editor, condition, region, 2)
    regional(condition, level)
    assert processors() == before
    with pytest.raises(RuntimeError):
        regional(condition[:, :5], level)
    assert processors() == before


@pytest.mark.slow
def test_region_is_exact_and_close_at_full_width(tmp_path: Path):
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    editor = load_editor(str(build_flux2_folder(tmp_path)))
    assert isinstance(editor, Flux2Editor)
    editor.transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=7680, guidance_embeds=False,
    ).eval().requires_grad_(False)  # fmt: skip
    editor._texts = {text: torch.randn(1, 64, 7680) for text in (INSTRUCTION, "")}
    condition, noise = torch.randn(2, 1, 128, 16, 16)
    region = torch.zeros(1, 16, 16, dtype=torch.bool)
    region[:, 4:12, 4:12] = True
    whole, regional = predictors(editor, condition, region, 9)
    levels, inside = editor.noise_levels(1.0, 20, (16, 16)), region[:, None].expand_as(condition)
    regional(levels[4].signal * condition + levels[4].noise * noise, levels[4])
    errors = []
    for level in (levels[4], levels[5], levels[8]):
        latents = level.signal * condition + level.noise * noise
        exact, approximate = whole(latents, level)[0][inside], regional(latents, level)[0][inside]
        errors.append(float((approximate - exact).norm() / exact.norm()))
    assert errors[0] < 1e-5 and all(1e-5 < error < 2e-3 for error in errors[1:]), errors
