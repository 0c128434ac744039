"""Embedded flow-matching editor: size, compatibility with diffusers, vocabulary, published files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wys_nerfstudio import relevance
from wys_nerfstudio.demo.images import LOCAL, held_out_views
from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.demo.training import train_flow_editor
from wys_nerfstudio.demo.training.flow_networks import TOKENS
from wys_nerfstudio.editing import load_editor, relevance_maps
from wys_nerfstudio.editing.editor import EMBEDDED_FLOW
from wys_nerfstudio.editing.flux2 import Flux2Editor
from wys_nerfstudio.evaluation.metrics import average_precision
from wys_nerfstudio.utils.errors import WysError

FOLDER = Path(train_flow_editor.__file__).parent.parent / "flow_editor"


def test_the_editor_is_small_and_has_no_pickled_files():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert len([file for file in files if file.suffix == ".safetensors"]) == 3


def test_the_configurations_name_no_path():
    for file in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in file.read_text("utf8"), file
        assert '"/' not in file.read_text("utf8"), file


def test_diffusers_pipeline_loads_the_editor(monkeypatch):
    from diffusers import Flux2KleinPipeline
    from PIL import Image

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = Flux2KleinPipeline.from_pretrained(str(FOLDER), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert not pipeline.config["is_distilled"]
    for name in ("transformer", "vae", "text_encoder"):
        (weights,) = (FOLDER / name).glob("*.safetensors")
        # Weights that a file lacks would be random; only the tied output layer is not stored.
        assert set(getattr(pipeline, name).state_dict()) - {"lm_head.weight"} == set(load_file(weights))
    edited = pipeline(
        Image.new("RGB", (80, 64), "white"),
        "make the ball blue",
        num_inference_steps=2,
        guidance_scale=1.5,
        max_sequence_length=TOKENS,
        text_encoder_out_layers=(1, 2),
    ).images[0]
    assert edited.size == (80, 64)


def test_the_vocabulary_covers_all_wordings():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    for edit in EDITS:
        for wording in edit.wordings:
            assert tokenizer.convert_ids_to_tokens(tokenizer(wording.upper() + "!").input_ids) == wording.split()
    assert tokenizer("turn the zebra red").input_ids.count(tokenizer.unk_token_id) == 1
    assert len({tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id}) == 3
    # transformers 4 does not know the class name that transformers 5 writes.
    config = json.loads((FOLDER / "tokenizer" / "tokenizer_config.json").read_text("utf8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_training_ended_with_maps_of_sufficient_precision():
    log = json.loads((FOLDER / "training.json").read_text("utf8"))
    assert log[-1]["AP N=1"] >= 0.8
    evaluation = json.loads((FOLDER / "evaluation.json").read_text("utf8"))
    assert evaluation["maps"]["all"]["AP N=1"] >= 0.8


def test_the_editor_is_loaded_by_name_and_its_maps_show_the_edited_object():
    editor = load_editor(EMBEDDED_FLOW)
    assert isinstance(editor, Flux2Editor) and editor.name == EMBEDDED_FLOW
    precisions = []
    for number, view in zip(range(6), held_out_views(LOCAL)):
        edit = LOCAL[number % len(LOCAL)]
        changed = (view[edit] != view[-1]).any(-1)
        picture = view[-1].float() / 255
        (raw,) = relevance_maps(editor, picture[None], EDITS[edit].wordings[0], seeds=[number], num_samples=4)
        precisions.append(average_precision(relevance.resize(raw, *changed.shape)[0], changed))
    assert sum(precisions) / len(precisions) > 0.7


def test_unknown_words_are_refused_with_the_known_ones():
    with pytest.raises(WysError, match='"turn the zebra red" has words .* its words are: a, add, .*panda, '):
        load_editor(EMBEDDED_FLOW).encode_text("turn the zebra red")
