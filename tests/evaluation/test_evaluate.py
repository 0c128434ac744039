"""Metrics of an edit: per view, and omitted where undefined."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from emulated_gpu import emulated_gpu

from wys_nerfstudio.evaluation import metrics
from wys_nerfstudio.evaluation.clip import load_clip
from wys_nerfstudio.evaluation.evaluate import (
    clip_metrics,
    edit_metrics,
    evaluate_edit,
    ground_truth_metrics,
    means,
)
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.lpips import Lpips
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import write_png


def random_views(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    captured = torch.rand(count, 36, 40, 3)
    return captured, (captured + 0.2 * torch.rand(count, 36, 40, 3)).clamp(0, 1)


def test_edit_metrics_equal_the_metrics_of_the_view(alexnet_file: Path) -> None:
    captured, edited = (views[0] for views in random_views())
    results = edit_metrics(captured, edited, Lpips(alexnet_file))
    assert results["edit_psnr"] == metrics.psnr(edited, captured) and results["edit_ssim"] == metrics.ssim(
        edited, captured
    )
    assert results["edit_lpips"] > 0
    assert edit_metrics(captured, captured, Lpips(alexnet_file))["edit_lpips"] == 0.0
    assert set(edit_metrics(captured, edited)) == {"edit_psnr", "edit_ssim"}


def test_views_are_evaluated_one_after_the_other(clip_folder: Path, alexnet_file: Path, capsys) -> None:
    captured, edited = random_views()
    taken = []

    def views():
        for view in range(3):
            taken.append(view)
            yield captured[view], edited[view]

    perceptual, names = Lpips(alexnet_file), ["0.png", "1.png", "2.png"]
    results = evaluate_edit(views(), names, perceptual, captions=("a bear", "a panda"), clip_model=str(clip_folder))
    assert taken == [0, 1, 2]
    assert re.search(r"Metrics of the edited views .* 100% \d+:\d+:\d+", capsys.readouterr().out)
    assert results["edit_psnr"] == [metrics.psnr(a, b) for a, b in zip(edited, captured)]
    assert results["edit_lpips"] == [edit_metrics(a, b, perceptual)["edit_lpips"] for a, b in zip(captured, edited)]
    clip = load_clip(str(clip_folder))
    before, after = (clip.embed_images(images) for images in (captured, edited))
    expected = clip_metrics(clip, before, after, ("a bear", "a panda"))
    assert expected.keys() < results.keys()
    for name, values in expected.items():
        assert results[name] == pytest.approx(values, abs=1e-4), name


def test_evaluation_leaves_lpips_on_its_device(alexnet_file: Path) -> None:
    with emulated_gpu():
        perceptual = Lpips(alexnet_file).to("cuda")
        captured, edited = (views.to("cuda") for views in random_views())
        on_gpu = evaluate_edit(zip(captured, edited), ["0.png", "1.png", "2.png"], perceptual)
        assert all(parameter.device.type == "cuda" for parameter in perceptual.parameters())
    captured, edited = random_views()
    on_cpu = evaluate_edit(zip(captured, edited), ["0.png", "1.png", "2.png"], Lpips(alexnet_file))
    for name, values in on_cpu.items():
        assert on_gpu[name] == pytest.approx(values, abs=1e-5), name


def test_clip_metrics_are_computed_from_the_embeddings(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder))
    captured, edited = random_views()
    before, after, texts = (
        clip.embed_images(captured),
        clip.embed_images(edited),
        clip.embed_texts(["a bear", "a panda"]),
    )
    results = clip_metrics(clip, before, after, ("a bear", "a panda"))
    expected = {
        "clip_image_similarity": metrics.image_similarity(before, after),
        "clip_text_image_similarity": metrics.text_image_similarity(after, texts[1]),
        "clip_direction_similarity": metrics.direction_similarity(before, after, texts[0], texts[1]),
        "clip_direction_consistency": metrics.direction_consistency(before, after),
        "clip_frame_consistency": metrics.frame_consistency(after),
    }
    assert set(results) == set(expected)
    for name, values in expected.items():
        assert results[name] == pytest.approx(values.tolist(), abs=1e-6), name
    without_text = clip_metrics(clip, before, after, None)
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
    results = [ground_truth_metrics(ground_truth, f"{i}.png", view) for i, view in enumerate(edited)]
    inside, outside = ([values[f"truth_psnr_{where}"] for values in results] for where in ("inside", "outside"))
    assert inside[0] == pytest.approx(metrics.psnr(edited[0, :10], expected[0, :10]), abs=1e-3) and inside[0] < 10
    assert outside[0] > 50, "equal up to 8-bit rounding"
    assert math.isnan(outside[1]) and math.isnan(inside[2])


def test_means_skip_undefined_values() -> None:
    nan = float("nan")
    assert means({"a": [1.0, nan, 4.0], "b": [nan, nan]}) == {"a": 2.5}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"3", b"[3]", b"null", b'[{"slug": "a"}]', b'{"instruction": "x"}', b"[" * 100000],
)
def test_damaged_ground_truth_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ground_truth").mkdir()
    (tmp_path / "ground_truth" / "edits.json").write_bytes(content)
    with pytest.raises(WysError, match='edits.json" is not a list of edits with slug, instruction') as error:
        GroundTruth.find(tmp_path, "turn it into a panda")
    assert len(str(error.value).splitlines()) == 1


def test_damaged_views_of_the_ground_truth_are_refused(tmp_path: Path) -> None:
    views, masks = torch.rand(1, 36, 40, 3), torch.zeros(1, 36, 40, dtype=torch.bool)
    write_ground_truth(tmp_path, views, masks)
    ground_truth = GroundTruth.find(tmp_path, "turn it into a panda")
    assert ground_truth is not None
    with pytest.raises(
        WysError, match="The ground truth of 0.png has another size than the view: 40x36 instead of 20x18"
    ):
        ground_truth_metrics(ground_truth, "0.png", torch.rand(18, 20, 3))
    with pytest.raises(WysError, match="There is no image .*missing.png.*the ground truth"):
        ground_truth_metrics(ground_truth, "missing.png", views[0])
    for part in ("masks", "images"):
        (ground_truth.folder / part / "0.png").write_bytes(b"x")
        with pytest.raises(WysError, match=f'{part}/0.png" .1 bytes. cannot be read as an image'):
            ground_truth_metrics(ground_truth, "0.png", views[0])
