"""Cache of relevance maps: maps are returned for an equal request only."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wys_nerfstudio.relevance.cache import RelevanceRequest, find_maps, save_maps

NAMES = ["frame_00", "frame_01", "frame_02"]
REQUEST = {
    "editor": "tiny",
    "dtype": "float16",
    "instruction": "make it red",
    "noise_level": 0.8,
    "num_samples": 1,
    "seed": 3,
    "resolution": None,
}


@pytest.fixture
def cached(tmp_path) -> torch.Tensor:
    raw = torch.rand(len(NAMES), 4, 5)
    save_maps(tmp_path / "relevance", RelevanceRequest(**REQUEST), NAMES, raw)
    return raw


def test_cached_maps_are_found(cached, tmp_path):
    maps = find_maps(tmp_path / "relevance", RelevanceRequest(**REQUEST), NAMES)
    assert maps is not None
    assert torch.equal(maps, cached)
    assert [path.name for path in (tmp_path / "relevance").iterdir()] == ["maps.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"editor": "x"},
        {"dtype": "float32"},
        {"instruction": "x"},
        {"noise_level": 0.7},
        {"num_samples": 2},
        {"seed": 4},
        {"resolution": 256},
        {"reference": "0123456789abcdef"},
    ],
)
def test_maps_of_another_request_are_not_returned(cached, tmp_path, change):
    assert find_maps(tmp_path / "relevance", RelevanceRequest(**{**REQUEST, **change}), NAMES) is None


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[::-1], [*NAMES, "frame_03"]])
def test_maps_of_other_views_are_not_returned(cached, tmp_path, names):
    assert find_maps(tmp_path / "relevance", RelevanceRequest(**REQUEST), names) is None


def test_a_folder_without_maps_returns_none(tmp_path):
    assert find_maps(tmp_path / "missing", RelevanceRequest(**REQUEST), NAMES) is None


def test_a_flipped_byte_in_the_maps_is_noticed(cached, tmp_path):
    path, request = tmp_path / "relevance" / "maps.safetensors", RelevanceRequest(**REQUEST)
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x55
        path.write_bytes(flipped)
        found = find_maps(tmp_path / "relevance", request, NAMES)
        assert found is None or torch.equal(found, cached), position


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_maps_are_not_returned(cached, tmp_path, length):
    path = tmp_path / "relevance" / "maps.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert find_maps(tmp_path / "relevance", RelevanceRequest(**REQUEST), NAMES) is None


@pytest.mark.parametrize("metadata", [None, {}, {"request": ""}])
def test_maps_without_their_request_are_not_returned(cached, tmp_path, metadata):
    save_file({"raw": cached}, tmp_path / "relevance" / "maps.safetensors", metadata=metadata)
    assert find_maps(tmp_path / "relevance", RelevanceRequest(**REQUEST), NAMES) is None


def test_maps_of_another_shape_are_not_returned(cached, tmp_path):
    path = tmp_path / "relevance" / "maps.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for tensors in ({"raw": cached[:2]}, {"raw": cached.reshape(3, 20)}, {"raw": cached.bfloat16()}, {"other": cached}):
        save_file(tensors, path, metadata=metadata)
        assert find_maps(tmp_path / "relevance", RelevanceRequest(**REQUEST), NAMES) is None


def test_a_folder_in_place_of_the_maps_returns_none(tmp_path):
    (tmp_path / "maps.safetensors").mkdir()
    assert find_maps(tmp_path, RelevanceRequest(**REQUEST), NAMES) is None
