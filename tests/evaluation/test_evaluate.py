"""Metrics of an edit: per view, and omitted where undefined."""

import json
import math
from pathlib import Path

import pytest
import torch

from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.evaluation.evaluate import clip_metrics, edit_metrics, ground_truth_metrics, means
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.lpips import Lpips
from wys_nerfstudio.utils.visualization import write_png


def random_views(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    captured = torch.rand(count, 36, 40, 3)
    return captured, (captured + 0.2 * torch.rand(count, 36, 40, 3)).clamp(0, 1)


def test_edit_metrics_are_computed_per_view(alexnet_file: Path) -> None:
    captured, edited = random_views()
    results = edit_metrics(captured, edited, Lpips(alexnet_file))
    assert results["edit_psnr"] == [metrics.psnr(a, b) for a, b in zip(edited, captured)]
    assert results["edit_ssim"] == [metrics.ssim(a, b) for a, b in zip(edited, captured)]
    assert len(results["edit_lpips"]) == 3 and min(results["edit_lpips"]) > 0
    assert edit_metrics(captured, captured, Lpips(alexnet_file))["edit_lpips"] == [0.0] * 3
    assert set(edit_metrics(captured, edited)) == {"edit_psnr", "edit_ssim"}


def test_clip_metrics_are_computed_from_the_embeddings(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder))
    captured, edited = random_views()
    results = clip_metrics(clip, captured, edited, ("a bear", "a panda"))
    before, after, texts = (
        clip.embed_images(captured),
        clip.embed_images(edited),
        clip.embed_texts(["a bear", "a panda"]),
    )
    expected = {
        "clip_image_similarity": metrics.image_similarity(before, after),
        "clip_text_image_similarity": metrics.text_image_similarity(after, texts[1]),
        "clip_direction_similarity": metrics.direction_similarity(before, after, texts[0], texts[1]),
        "clip_direction_consistency": metrics.direction_consistency(before, after),
        "clip_frame_consistency": metrics.frame_consistency(after),
    }
    assert set(results) == set(expected)
    for name, values in expected.items():
        assert results[name] == pytest.approx(values.tolist(), abs=1e-4), name
    without_text = clip_metrics(clip, captured, edited, None)
    assert set(expected) - set(without_text) == {"clip_text_image_similarity", "clip_direction_similarity"}


def write_ground_truth(scene: Path, expected: torch.Tensor, masks: torch.Tensor) -> None:
    folder = scene / "ground_truth" / "panda"
    for i, (view, mask) in enumerate(zip(expected, masks)):
        write_png(folder / "images" / f"{i}.png", view)
        write_png(folder / "masks" / f"{i}.png", mask.float())
    edit = {
        "slug": "panda",
        "instruction": "turn it into a panda",
        "caption_before": "a bear",
        "caption_after": "a panda",
    }
    (scene / "ground_truth" / "edits.json").write_text(json.dumps([edit]))


def test_ground_truth_psnr_inside_and_outside_the_mask(tmp_path: Path) -> None:
    _, edited = random_views()
    expected = (edited * 255).round() / 255
    masks = torch.zeros(3, 36, 40, dtype=torch.bool)
    masks[0, :10], masks[1] = True, True
    expected[0, :10] = ((expected[0, :10] + 0.5) % 1.0 * 255).round() / 255
    write_ground_truth(tmp_path, expected, masks)
    ground_truth = GroundTruth.find(tmp_path, "Turn it into a PANDA!")
    assert ground_truth is not None and ground_truth.captions == ("a bear", "a panda")
    assert (
        GroundTruth.find(tmp_path, "turn it into a hat") is None and GroundTruth.find(tmp_path / "missing", "x") is None
    )
    results = ground_truth_metrics(ground_truth, ["0.png", "1.png", "2.png"], edited)
    inside, outside = results["truth_psnr_inside"], results["truth_psnr_outside"]
    assert inside[0] == pytest.approx(metrics.psnr(edited[0, :10], expected[0, :10]), abs=1e-3) and inside[0] < 10
    assert outside[0] > 50, "equal up to 8-bit rounding"
    assert math.isnan(outside[1]) and math.isnan(inside[2])


def test_means_skip_undefined_values() -> None:
    nan = float("nan")
    assert means({"a": [1.0, nan, 4.0], "b": [nan, nan]}) == {"a": 2.5}
