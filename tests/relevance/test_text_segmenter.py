"""Masks from the name of an object: equal to those of transformers' own processors, and refusals of models."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_gpu import emulated_gpu
from PIL import Image
from safetensors.torch import load_file, save_file
from segmenter_folders import TOKENS, build_segmenter_folder

from wys_nerfstudio.relevance.text_segmenter import SHARED_EMBEDDING, load_text_segmenter
from wys_nerfstudio.utils.errors import WysError

TEXT = " The Red bear. a HAT."


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_boxes(folder: Path, image: Image.Image, text: str, threshold: float) -> torch.Tensor:
    """Return the boxes of transformers' documented use of Grounding DINO."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        outputs = AutoModelForZeroShotObjectDetection.from_pretrained(folder, attn_implementation="eager")(**inputs)
    (found,) = processor.post_process_grounded_object_detection(
        outputs, inputs.input_ids, threshold=threshold, target_sizes=[image.size[::-1]]
    )
    return found["boxes"]


def reference_mask(folder: Path, image: Image.Image, boxes: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the union of the masks of transformers' documented use of SAM 2."""
    from transformers import Sam2Model, Sam2Processor

    processor = Sam2Processor.from_pretrained(folder)
    inputs = processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
    with torch.no_grad():
        outputs = Sam2Model.from_pretrained(folder)(**inputs, multimask_output=False)
    (logits,) = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], binarize=False)
    return (logits.double().sigmoid() > threshold).any(dim=0)[0]


@pytest.mark.parametrize(
    ("height", "width", "box_threshold", "pixel_threshold"), [(40, 61, 0.9995, 0.53), (70, 33, 0.99, 0.53)]
)
@pytest.mark.parametrize("video", [False, True])
def test_masks_equal_those_of_transformers(
    tmp_path, detector_folder, height, width, box_threshold, pixel_threshold, video
):
    pixels = noise(height, width)
    segmenter_folder = build_segmenter_folder(tmp_path / "sam", video=video)
    segmenter = load_text_segmenter(str(detector_folder), str(segmenter_folder))
    mask = segmenter.segment(torch.from_numpy(pixels), TEXT, box_threshold, pixel_threshold)
    image = Image.fromarray(pixels)
    boxes = reference_boxes(detector_folder, image, "the red bear. a hat.", box_threshold)
    assert 1 < len(boxes) < 12
    assert torch.equal(mask, reference_mask(segmenter_folder, image, boxes, pixel_threshold))
    assert mask.shape == (height, width) and mask.any() and not mask.all()


def test_a_segmenter_may_have_its_position_embedding_under_one_name(tmp_path, detector_folder, segmenter_folder):
    without = shutil.copytree(segmenter_folder, tmp_path / "without")
    weights = load_file(without / "model.safetensors")
    weights.setdefault(SHARED_EMBEDDING, weights["shared_image_embedding.positional_embedding"].clone())
    both = shutil.copytree(without, tmp_path / "both")
    save_file(weights, both / "model.safetensors", metadata={"format": "pt"})
    del weights[SHARED_EMBEDDING]
    save_file(weights, without / "model.safetensors", metadata={"format": "pt"})
    pixels = torch.from_numpy(noise(40, 61))
    masks = [
        load_text_segmenter(str(detector_folder), str(folder)).segment(pixels, TEXT, 0.9995, 0.53)
        for folder in (both, without)
    ]
    assert masks[0].any() and not masks[0].all()
    assert torch.equal(*masks)


def test_without_boxes_a_mask_is_empty(detector_folder, segmenter_folder):
    segmenter = load_text_segmenter(str(detector_folder), str(segmenter_folder))
    mask = segmenter.segment(torch.from_numpy(noise(20, 30)), "a bear", 1 - 1e-7, 0.5)
    assert mask.shape == (20, 30) and not mask.any()


def test_a_gpu_makes_the_masks_of_the_cpu(detector_folder, segmenter_folder):
    names, pixels = (str(detector_folder), str(segmenter_folder)), torch.from_numpy(noise(40, 61))
    expected = load_text_segmenter(*names).segment(pixels, TEXT, 0.5, 0.5)
    with emulated_gpu():
        mask = load_text_segmenter(*names, device="cuda").segment(pixels, TEXT, 0.5, 0.5)
    assert mask.device.type == "cpu" and torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_segmenters_only(detector_folder, segmenter_folder, dtype):
    segmenter = load_text_segmenter(str(detector_folder), str(segmenter_folder), dtype=dtype)
    assert (segmenter.detector.dtype, segmenter.segmenter.dtype) == (torch.float32, dtype)
    assert segmenter.segment(torch.from_numpy(noise(40, 61)), TEXT, 0.5, 0.5).any()


def test_texts_beyond_the_detectors_limit_are_refused(detector_folder, segmenter_folder):
    segmenter = load_text_segmenter(str(detector_folder), str(segmenter_folder))
    segmenter.check_text(" ".join(["bear"] * (TOKENS - 3)))  # and a full stop between two special tokens
    with pytest.raises(WysError) as error:
        segmenter.check_text(" ".join(["bear"] * (TOKENS - 2)))
    assert f"has {TOKENS + 1} tokens, but the detector takes at most {TOKENS}: shorten it." in str(error.value)


def changed(folder: Path, source: Path, **config: object) -> Path:
    """Copy a model and change its config.json."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def refusal(detector: "str | Path", segmenter: "str | Path") -> str:
    with pytest.raises(WysError) as error:
        load_text_segmenter(str(detector), str(segmenter))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_of_other_types_are_refused(tmp_path, detector_folder, segmenter_folder):
    other = changed(tmp_path / "other", detector_folder, model_type="owlv2")
    assert refusal(other, segmenter_folder) == (
        f'The detector "{other}" has the model_type owlv2 in its config.json. Supported: grounding-dino, for example '
        "IDEA-Research/grounding-dino-base."
    )
    assert refusal(detector_folder, detector_folder) == (
        f'The segmenter "{detector_folder}" has the model_type grounding-dino in its config.json. Supported: sam2, sam2_video, '
        "for example facebook/sam2.1-hiera-large."
    )


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_incomplete_models_are_refused(tmp_path, detector_folder, segmenter_folder, kind):
    folders = {"detector": detector_folder, "segmenter": segmenter_folder}
    folders[kind] = changed(tmp_path / "cut", folders[kind])
    file = tmp_path / "cut" / "model.safetensors"
    weights = load_file(file)
    removed = max(name for name in weights if name.endswith("weight"))
    del weights[removed]
    save_file(weights, file, metadata={"format": "pt"})
    sentence = refusal(**folders)
    assert sentence.startswith(
        f'The {kind} "{tmp_path / "cut"}" could not be loaded from its folder: its weights lack {removed} or have another size.'
    )
    file.write_bytes(b"not weights")
    assert refusal(**folders).endswith(
        f". Give --{kind} a hub id, or a local folder in transformers format with safetensors weights."
    )
    (tmp_path / "cut" / "config.json").unlink()
    assert refusal(**folders).startswith(f'The {kind} "{tmp_path / "cut"}" has no model_type in its config.json.')


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_without_a_network_hub_ids_are_refused(detector_folder, segmenter_folder, kind):
    names = {"detector": str(detector_folder), "segmenter": str(segmenter_folder), kind: "someone/model"}
    assert refusal(**names) == (
        f'The {kind} "someone/model" is not downloaded, and the Hugging Face hub cannot be reached: connect to the network (and '
        f"unset HF_HUB_OFFLINE), or give --{kind} a local folder."
    )


def test_memory_errors_of_loading_are_not_taken_for_a_bad_folder(monkeypatch, detector_folder, segmenter_folder):
    def run_out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("transformers.Sam2Model.from_pretrained", run_out_of_memory)
    with pytest.raises(MemoryError):
        load_text_segmenter(str(detector_folder), str(segmenter_folder))


def test_code_of_a_repository_is_not_executed(tmp_path, detector_folder, segmenter_folder):
    folders = []
    for source in (detector_folder, segmenter_folder):
        folder = shutil.copytree(source, tmp_path / f"code_{len(folders)}")
        (folder / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Part: pass\n")
        kinds = ("AutoImageProcessor", "AutoTokenizer", "AutoProcessor", "AutoConfig", "AutoModel")
        for file in folder.glob("*.json"):
            content = json.loads(file.read_text())
            if isinstance(content, dict) and "model" not in content:
                replaced = {"image_processor_type": "Part", "tokenizer_class": "Part"}
                replaced = {key: value for key, value in replaced.items() if key in content}
                auto = {"auto_map": {kind: "code.Part" for kind in kinds}}
                file.write_text(json.dumps({**content, **replaced, **auto}))
        folders.append(str(folder))
    for names in ((folders[0], str(segmenter_folder)), (str(detector_folder), folders[1])):
        with suppress(WysError):
            load_text_segmenter(*names)
    assert not (tmp_path / "executed").exists()
