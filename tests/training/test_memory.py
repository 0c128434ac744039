"""Options that are recommended after a run has run out of memory."""

import copy
from typing import get_args

import pytest
from nerfstudio.configs.method_configs import all_methods

from wys_nerfstudio.training.memory import ACTIVITIES, RunActivity, memory_remedies
from wys_nerfstudio.training.schedule import Phase

LESS = "ns-train wys-small"
IMAGES, EDITOR = "--pipeline.datamanager.images-on-gpu False", "--pipeline.editor-device cpu (or cuda:1)"
RAYS, CHUNK = "--pipeline.datamanager.{}-num-rays-per-batch {}", "--pipeline.model.eval-num-rays-per-chunk {}"
RESOLUTION = "a lower --pipeline.edit-resolution"


def options(method: str, **changes: object):
    config = copy.deepcopy(all_methods[method].pipeline)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("activity", "phase", "method", "changes", "expected"),
    [
        ("preparation", None, "wys", {}, [LESS, IMAGES, EDITOR, "smaller views"]),
        ("relevance maps", Phase.RECONSTRUCT, "wys", {}, [LESS, "--pipeline.relevance-batch-size 1", IMAGES, EDITOR, RESOLUTION]),
        ("relevance maps", Phase.RECONSTRUCT, "wys-small", {"editor_device": "cuda:1"}, [RESOLUTION]),
        ("edits", Phase.EDIT, "wys", {"edit_count": 2}, [LESS, "--pipeline.edit-count 1", CHUNK.format(16384), IMAGES, EDITOR, RESOLUTION]),
        ("training", Phase.RECONSTRUCT, "wys", {}, [LESS, RAYS.format("train", 2048), IMAGES]),
        ("training", Phase.EDIT, "wys", {}, [LESS, RAYS.format("edit", 8192), IMAGES, EDITOR]),
        ("training", Phase.LOCALIZE, "wys", {}, [LESS, RAYS.format("train", 2048), IMAGES]),
        ("training", Phase.LOCALIZE, "wys-tiny", {}, [RAYS.format("localize", 256), IMAGES]),
        ("renders", Phase.LOCALIZE, "wys-small", {}, [CHUNK.format(4096)]),
    ],
)  # fmt: skip
def test_remedies_fit_activity_and_options(activity, phase, method, changes, expected) -> None:
    assert memory_remedies(activity, phase, method, options(method, **changes), on_gpu=True) == expected


@pytest.mark.parametrize("activity", get_args(RunActivity))
def test_on_the_cpu_no_other_device_is_recommended(activity: RunActivity) -> None:
    found = memory_remedies(activity, Phase.EDIT, "wys-tiny", options("wys-tiny"), on_gpu=False)
    assert found and not any("gpu" in remedy or "device" in remedy for remedy in found)
    assert activity in ACTIVITIES
