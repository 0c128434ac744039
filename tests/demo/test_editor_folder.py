"""Embedded editor: size, compatibility with diffusers, vocabulary, training."""

import json
from pathlib import Path

import pytest
import torch

from wys_nerfstudio.demo.instructions import BY_SLUG, EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.training import editor_data, train_editor
from wys_nerfstudio.demo.training.networks import (
    Networks,
    build_unet_and_text_encoder,
    build_vae,
    load_tokenizer,
    write_editor,
)
from wys_nerfstudio.demo.training.optimizers import MuonAndAdamW

EDITOR = Path(train_editor.__file__).parent.parent / "editor"


def test_the_editor_is_small_and_has_no_pickled_files():
    files = [file for file in EDITOR.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_diffusers_pipeline_loads_the_editor():
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(str(EDITOR), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (40, 32), "white")
    edited = pipeline("make the ball blue", image=image, num_inference_steps=2, guidance_scale=3.0).images[0]
    assert edited.size == (40, 32)


def test_the_vocabulary_covers_all_wordings(tmp_path):
    tokenizer = load_tokenizer(EDITOR)
    for edit in EDITS:
        for wording in edit.wordings:
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(wording).input_ids)
            assert len(tokens) <= tokenizer.model_max_length
            assert all(token.endswith("</w>") for token in tokens[1:-1]), tokens
            assert [t.removesuffix("</w>") for t in tokens[1:-1]] == wording.replace("don't", "don 't").split()
    assert tokenizer("Make the BALL blue").input_ids == tokenizer("make the ball blue").input_ids
    assert tokenizer.unk_token_id in tokenizer("zebra").input_ids


def test_pairs_contrast_ball_and_block():
    pairs = editor_data.draw_pairs(400, torch.Generator().manual_seed(0))
    slugs = [(EDITS[a].slug, EDITS[b].slug) for a, b in pairs.tolist()]
    contrast = [(a, b) for a, b in slugs if a.startswith("ball") and b == a.replace("ball", "block")]
    assert 0.25 < len(contrast) / len(slugs) < 0.45
    assert {s for pair in slugs for s in pair} == set(BY_SLUG)


def small_trainer(tmp_path, batch_scenes=8, **options):
    vae = build_vae()
    write_editor(tmp_path / "editor", Networks(build_unet_and_text_encoder()[0], vae, build_unet_and_text_encoder()[1]))
    settings = train_editor.Options(tmp_path, batch_scenes=batch_scenes, **options)
    data = editor_data.Latents(torch.randn(3, len(EDITS), 4, 8, 8).half(), torch.ones(3, len(EDITS), 8, 8).bool())
    return train_editor.Trainer(settings, vae, editor_data.tokenize(tmp_path / "editor")), [data]


@pytest.mark.parametrize("meaning", ["no change", "edit"])
def test_targets_of_dropped_instructions(tmp_path, meaning):
    trainer, data = small_trainer(tmp_path, empty_means=meaning)
    dropped = 0
    for trainer.step in range(12):
        batch = trainer.make_batch(data)
        inputs, timestep, tokens, target = batch.inputs, batch.timestep, batch.tokens, batch.target
        empty = (tokens == trainer.tokens[-1][0]).all(1) & (inputs[:, 4:] != 0).flatten(1).any(1)
        alpha = trainer.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        clean = alpha.sqrt() * inputs[:, :4] - (1 - alpha).sqrt() * target
        same = (clean / trainer.vae.config["scaling_factor"] - inputs[:, 4:]).abs().flatten(1).amax(1) < 1e-2
        dropped += int(empty.sum())
        if meaning == "no change":
            assert same[empty].all()
        elif empty.any():
            assert same[empty].float().mean() < 0.8
    assert dropped > 5


def test_both_samples_of_a_scene_share_noise_and_timestep(tmp_path):
    trainer, data = small_trainer(tmp_path)
    batch = trainer.make_batch(data)
    assert torch.equal(batch.timestep[::2], batch.timestep[1::2])
    assert batch.weight.min() >= 1 and batch.weight.max() == 4
    assert torch.equal(batch.inputs, trainer.make_batch(data).inputs)
    assert {EDITS[i].kind for i in range(8)} <= set(LOCAL_KINDS)


def test_noised_unedited_images_are_equal_for_both_edits(tmp_path):
    trainer, data = small_trainer(tmp_path, from_before=1.0)
    batch = trainer.make_batch(data)
    alpha = trainer.alphas_cumprod[batch.timestep].view(-1, 1, 1, 1)
    noisy = (batch.timestep >= train_editor.FROM_BEFORE_TIMESTEP) & batch.complete
    pairs = noisy[::2] & noisy[1::2]
    assert pairs.any()
    assert torch.equal(batch.inputs[::2][pairs], batch.inputs[1::2][pairs])
    # The target is still the edited image.
    clean = (alpha.sqrt() * batch.inputs[:, :4] - (1 - alpha).sqrt() * batch.target) / trainer.vae.config[
        "scaling_factor"
    ]
    edited = data[0].codes.float().flatten(0, 1)
    distance = (clean[:, None] - edited[None]).abs().flatten(2).amax(2).amin(1)
    assert distance.max() < 1e-2


@pytest.mark.parametrize("samples", [0, 10**6])
def test_only_the_segmentation_loss_is_used_at_first(tmp_path, samples):
    trainer, data = small_trainer(tmp_path, batch_scenes=2, grounding_samples=samples)
    before = [p.detach().clone() for p in (trainer.unet.conv_out.weight, trainer.segmenter.weight)]
    trainer.train_step(data, 1.0)
    assert torch.equal(before[0], trainer.unet.conv_out.weight) == (samples > 0)
    assert not torch.equal(before[1], trainer.segmenter.weight)


@pytest.mark.slow
def test_training_resumes_from_a_checkpoint(tmp_path):
    first, data = small_trainer(tmp_path, batch_scenes=2)
    first.train_step(data, 1.0)
    first.save(tmp_path / "state.pt")
    expected = first.train_step(data, 1.0)
    second, _ = small_trainer(tmp_path, batch_scenes=2)
    second.load(tmp_path / "state.pt")
    assert second.train_step(data, 1.0) == pytest.approx(expected, rel=1e-3)


def test_training_continues_from_a_trained_editor(tmp_path):
    first, data = small_trainer(tmp_path, batch_scenes=2, grounding_samples=0)
    first.train_step(data, 1.0)
    write_editor(tmp_path / "editor", first.networks())
    log = [{"samples": 400, "seconds": 30.0}]
    (tmp_path / "editor" / "training.json").write_text(json.dumps(log))
    second = small_trainer(tmp_path / "second", batch_scenes=2, grounding_samples=0)[0]
    second.begin_from(tmp_path / "editor")
    assert (second.samples, second.seconds, second.log) == (400, 30.0, log)
    for source, restored in zip(first.average, (second.unet, second.text_encoder)):
        for one, other in zip(source.parameters(), restored.parameters()):
            assert torch.equal(one.half().float(), other)
    second.train_step(data, 1.0)
    assert second.samples == 404


def test_the_optimizer_updates_all_parameters():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = MuonAndAdamW([net], muon_rate=1e-2, adamw_rate=1e-2)
    inputs = torch.randn(16, 3, 3, 3)
    losses = []
    for _ in range(20):
        loss = (net(inputs) - inputs[:, :1, 0, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
