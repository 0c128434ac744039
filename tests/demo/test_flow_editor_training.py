"""Training of the flow-matching editor: tokens, conventions, initialization, targets, folder."""

import pytest
import torch

from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.demo.training import flow_networks, train_flow_editor
from wys_nerfstudio.demo.training.editor_data import NO_CHANGE, Latents
from wys_nerfstudio.demo.training.train_flow_editor import FROM_BEFORE_TIME, FlowTrainer, Options

HEIGHT, WIDTH = 6, 8


@pytest.fixture
def trainer(tmp_path):
    return FlowTrainer(Options(tmp_path, batch_scenes=8, grounding_samples=0), flow_networks.build_vae())


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(3, len(EDITS), 8, HEIGHT, WIDTH, generator=draw).half()
    return Latents(codes, torch.rand(3, len(EDITS), HEIGHT, WIDTH, generator=draw) < 0.5)


def test_instructions_are_whole_words():
    tokenizer = flow_networks.build_tokenizer()
    for edit in EDITS:
        for wording in edit.wordings:
            (tokens,), (mask,) = flow_networks.tokenize(tokenizer, [wording.capitalize() + "!"])
            shown = tokenizer.convert_ids_to_tokens(tokens[mask.bool()])
            assert shown == [*wording.split(), flow_networks.END]


def test_unknown_words_and_the_empty_instruction():
    tokenizer = flow_networks.build_tokenizer()
    tokens, mask = flow_networks.tokenize(tokenizer, ["make the zebra red", ""])
    assert tokens.shape == (2, flow_networks.TOKENS)
    assert tokenizer.unk_token_id in tokens[0] and tokenizer.unk_token_id not in tokens[1]
    assert mask.sum(1).tolist() == [5, 1]
    assert len({tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id}) == 3


def test_the_tokens_are_those_of_the_pipeline():
    from diffusers import Flux2KleinPipeline

    _, text_encoder = flow_networks.build_transformer_and_text_encoder()
    tokenizer = flow_networks.build_tokenizer()
    expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        text_encoder,
        tokenizer,
        ["make it snow", ""],
        max_sequence_length=flow_networks.TOKENS,
        hidden_states_layers=[1, 2],
    )
    tokens, mask = flow_networks.tokenize(tokenizer, ["make it snow", ""])
    torch.testing.assert_close(flow_networks.text_states(text_encoder, tokens, mask, 128), expected)


def test_patches_and_positions_are_those_of_the_pipeline():
    from diffusers import Flux2KleinPipeline

    latents = torch.randn(2, 2, 2 * HEIGHT, 2 * WIDTH)
    patches = Flux2KleinPipeline._patchify_latents(latents)
    assert torch.equal(flow_networks.patchify(latents), patches)
    noisy = Flux2KleinPipeline._prepare_latent_ids(patches[:1])
    reference = Flux2KleinPipeline._prepare_image_ids([patches[:1]])
    assert torch.equal(flow_networks.position_ids(HEIGHT, WIDTH), torch.cat([noisy, reference], 1)[0])
    assert torch.equal(flow_networks.text_ids(5), Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 5, 1))[0])


def test_heads_attend_to_neighbors_and_to_the_other_image(monkeypatch):
    from diffusers.models.transformers import transformer_flux2

    torch.manual_seed(0)
    transformer, _ = flow_networks.build_transformer_and_text_encoder()
    height, width, text = 16, 20, 16
    row, column, found, attend = 5, 7, [], transformer_flux2.dispatch_attention_fn

    def record(query, key, value, **options):
        logits = query[0, text + row * width + column][..., None] * key[0].transpose(0, 1).transpose(1, 2)
        weights, tokens = (logits.sum(1) / query.shape[-1] ** 0.5).softmax(-1).max(-1)
        found.append([divmod(t - text, width) for t, w in zip(tokens.tolist(), weights.tolist()) if w > 0.5])
        return attend(query, key, value, **options)

    monkeypatch.setattr(transformer_flux2, "dispatch_attention_fn", record)
    with torch.no_grad():
        transformer(
            hidden_states=torch.randn(2, 2 * height * width, 8),
            timestep=torch.tensor([0.02, 1.0]),
            encoder_hidden_states=torch.randn(2, text, 128),
            img_ids=flow_networks.position_ids(height, width),
            txt_ids=flow_networks.text_ids(text),
        )
    counterpart = (height + row, column)
    assert found[0] == [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
    assert [heads[0] for heads in found[1:]] == [counterpart] * 4
    assert [heads[1] for heads in found[1:]] == [(row, 5), (row, 9), (3, column), (7, column)]


@pytest.mark.parametrize("crop", [None, 4])
def test_shapes_of_a_training_step(trainer, data, crop):
    size = (crop, crop) if crop else (HEIGHT, WIDTH)
    batch = trainer.make_batch(data, crop)
    assert batch.noised.shape == batch.reference.shape == batch.target.shape == (16, 8, *size)
    assert batch.weight.shape == (16, 1, *size) and batch.segmentation.shape == (16, 4, *size)
    before = [p.detach().clone() for p in trainer.average[0].parameters()]
    assert trainer.train_step(data, 1.0, crop) > 0
    assert trainer.samples == 16
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.average[0].parameters()))


def test_the_target_velocity_leads_to_the_edit_or_for_the_empty_instruction_to_the_unedited_image(trainer, data):
    edited = data.codes.float().flatten(0, 1)
    dropped = unedited = 0
    for trainer.step in range(12):
        batch = trainer.make_batch(data, None)
        share = batch.time.view(-1, 1, 1, 1)
        clean = batch.noised - share * batch.target
        assert (clean[:, None] - edited[None]).abs().flatten(2).amax(2).amin(1).max() < 1e-2
        same = (clean - batch.reference).abs().flatten(1).amax(1) < 1e-2
        assert same[~batch.instructed].all()
        assert torch.equal(batch.instructed, batch.mask.sum(1) > 1)
        dropped += int((~batch.instructed).sum())
        unedited += int(same[batch.instructed].sum())
    assert dropped > 5 and unedited < 0.3 * (192 - dropped)


def test_both_samples_of_a_scene_share_noise_and_time(trainer, data):
    trainer.options.from_before = 1.0
    batch = trainer.make_batch(data, None)
    assert torch.equal(batch.time[::2], batch.time[1::2])
    same = (batch.noised[::2] == batch.noised[1::2]).flatten(1).all(1)
    assert same[batch.time[::2] >= FROM_BEFORE_TIME].all() and same.any()
    assert batch.weight.min() == 1 and batch.weight.max() == 4


def test_training_resumes_from_a_checkpoint(trainer, data, tmp_path):
    trainer.train_step(data, 1.0, 4)
    trainer.save(tmp_path / "state.pt")
    # The state of the optimizer shows in the loss of the second step.
    expected = [trainer.train_step(data, 1.0, 4) for _ in range(2)]
    other = FlowTrainer(trainer.options, trainer.vae)
    other.load(tmp_path / "state.pt")
    assert [other.train_step(data, 1.0, 4) for _ in range(2)] == pytest.approx(expected, rel=1e-3)


def test_latents_are_normalized_as_the_pipeline_does(trainer, tmp_path):
    import numpy as np

    images = np.random.default_rng(0).integers(0, 255, (2, len(EDITS), 16, 24, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    train_flow_editor.set_normalization(trainer.vae, tmp_path / "images.npy")
    latents = train_flow_editor.encode_images(trainer.vae, tmp_path / "images.npy", tmp_path / "latents.npy")
    assert latents.codes.shape == (2, len(EDITS), 8, 4, 6) and latents.changed.shape == (2, len(EDITS), 4, 6)
    assert not latents.changed[:, NO_CHANGE].any()
    assert latents.codes.float().mean((0, 1, 3, 4)).abs().max() < 0.1
    assert (latents.codes.float().std((0, 1, 3, 4)) - 1).abs().max() < 0.1


def test_the_pipeline_loads_a_written_folder(trainer, tmp_path):
    from diffusers import Flux2KleinPipeline
    from PIL import Image

    folder = tmp_path / "flow_editor"
    folder.mkdir()
    (folder / "README.md").write_text("card")
    networks = trainer.networks()
    networks.vae.save_pretrained(tmp_path / "vae")
    networks.vae = type(networks.vae).from_pretrained(tmp_path / "vae")  # its configuration now has a path
    flow_networks.write_flow_editor(folder, networks)
    assert (folder / "README.md").read_text() == "card"
    assert not [f for f in folder.rglob("*.json") if str(tmp_path) in f.read_text()]
    pipeline = Flux2KleinPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    edited = pipeline(
        Image.new("RGB", (80, 64), "white"),
        "make the ball blue",
        num_inference_steps=2,
        guidance_scale=1.5,
        max_sequence_length=flow_networks.TOKENS,
        text_encoder_out_layers=(1, 2),
    ).images[0]
    assert edited.size == (80, 64)
