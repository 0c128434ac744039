"""LPIPS, compared with torchmetrics, with AlexNet weights from a file and from torch's cache."""

import shutil
from pathlib import Path

import pytest
import torch

from wys_nerfstudio.evaluation.lpips import Lpips, lpips_is_cached
from wys_nerfstudio.utils.errors import WysError

CACHED_NAME = "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="module")
def lpips(alexnet_file: Path) -> Lpips:
    return Lpips(alexnet_file)


@pytest.fixture
def torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty torch cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_equal_images_have_distance_zero(lpips):
    assert float(lpips(images(), images())) == 0


def test_the_distance_is_positive_and_symmetric(lpips):
    forward, backward = lpips(images(seed=1), images(seed=2)), lpips(images(seed=2), images(seed=1))
    assert float(forward) > 0
    torch.testing.assert_close(forward, backward)


def test_the_distance_of_a_batch_is_the_mean_of_its_pairs(lpips):
    a, b = images(3, seed=1), images(3, seed=2)
    pairs = [float(lpips(a[i : i + 1], b[i : i + 1])) for i in range(3)]
    assert float(lpips(a, b)) == pytest.approx(sum(pairs) / 3, rel=1e-4)


def test_the_distance_equals_torchmetrics_lpips(alexnet_file, torch_cache):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import alexnet

    # torchvision loads the complete network from its cache, including the classifier.
    state = {**alexnet(weights=None).state_dict(), **torch.load(alexnet_file, weights_only=True)}
    torch.save(state, torch_cache / CACHED_NAME)
    torchmetrics_lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    expected = torchmetrics_lpips(images(seed=1), images(seed=2))
    torch.testing.assert_close(Lpips(alexnet_file)(images(seed=1), images(seed=2)), expected)
    torch.testing.assert_close(Lpips()(images(seed=1), images(seed=2)), expected)


def test_gradients_reach_the_images_but_not_the_weights(lpips):
    image = images(seed=1).requires_grad_()
    lpips(image, images(seed=2)).backward()
    assert image.grad is not None
    assert bool((image.grad.flatten(1).abs().amax(dim=1) > 0).all())
    assert not any(p.requires_grad for p in lpips.parameters())


def test_training_mode_does_not_change_the_distance(alexnet_file):
    lpips = Lpips(alexnet_file)
    before = lpips(images(seed=1), images(seed=2))
    lpips.train()
    assert torch.equal(lpips(images(seed=1), images(seed=2)), before)


def test_a_file_is_cached_if_it_exists(alexnet_file, tmp_path):
    assert lpips_is_cached(alexnet_file)
    assert not lpips_is_cached(tmp_path / "missing.pth")


def test_torchs_cache_is_searched_for_the_weights(alexnet_file, torch_cache):
    assert not lpips_is_cached(None)
    shutil.copy(alexnet_file, torch_cache / CACHED_NAME)
    assert lpips_is_cached(None)


REMEDY = "--pipeline.model.lpips-weights.*--pipeline.model.lpips-loss-mult 0"


def test_a_missing_file_is_reported_with_remedies(tmp_path):
    with pytest.raises(WysError, match=f'AlexNet.*LPIPS.*could not be loaded from "{tmp_path}/missing.pth".*{REMEDY}'):
        Lpips(tmp_path / "missing.pth")


def test_an_invalid_file_is_reported_with_remedies(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth"):
        with pytest.raises(WysError, match=f'could not be loaded from "{tmp_path}/{name}".*{REMEDY}'):
            Lpips(tmp_path / name)


def test_a_failed_download_is_reported_with_remedies(torch_cache, monkeypatch):
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # a closed port
    for exception in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(exception, raising=False)
    with pytest.raises(WysError, match=f"could not be loaded by torch .is there a network.*{REMEDY}"):
        Lpips()


def test_memory_errors_are_not_taken_for_bad_weights(alexnet_file, monkeypatch):
    load = torch.load

    def run_out_of_memory(path: object, *arguments: object, **named: object) -> object:
        if path == alexnet_file:
            raise MemoryError
        return load(path, *arguments, **named)  # type: ignore  # torchmetrics' linear layers

    monkeypatch.setattr(torch, "load", run_out_of_memory)
    with pytest.raises(MemoryError):
        Lpips(alexnet_file)
