"""Held-out views of small captures in the formats of nerfstudio's parsers."""

import json
import math
from pathlib import Path

import pytest
from conftest import as_colmap_scene, sentence_of, write_ring_scene
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from wys_nerfstudio.datamanager import WysDataManager, WysDataManagerConfig
from wys_nerfstudio.utils.errors import WysError


def load(folder: Path, views: int, parser: DataParserConfig) -> WysDataManager:
    scene = write_ring_scene(folder / "ring", views=views)
    if isinstance(parser, ColmapDataParserConfig):
        scene = as_colmap_scene(scene, folder / "colmap")
    meta = json.loads((folder / "ring" / "transforms.json").read_text())
    meta["camera_angle_x"] = 2 * math.atan(0.5 / 1.2)
    (folder / "ring" / "transforms.json").write_text(json.dumps(meta))
    config = WysDataManagerConfig(data=scene, dataparser=parser, eval_num_rays_per_batch=64)  # type: ignore
    return config.setup(device="cpu", test_mode="test", world_size=1, local_rank=0)


@pytest.mark.parametrize(
    ("parser", "views", "held_out"),
    [
        (NerfstudioDataParserConfig(load_3D_points=False), 2, 0),
        (NerfstudioDataParserConfig(load_3D_points=False), 9, 0),
        (NerfstudioDataParserConfig(load_3D_points=False), 10, 1),
        (NerfstudioDataParserConfig(load_3D_points=False, eval_mode="interval"), 3, 1),
        (NerfstudioDataParserConfig(load_3D_points=False, train_split_fraction=1.0), 12, 0),
        (InstantNGPDataParserConfig(), 2, 0),
        (InstantNGPDataParserConfig(), 9, 0),
        (ColmapDataParserConfig(load_3D_points=False), 3, 1),
        (ColmapDataParserConfig(load_3D_points=False), 9, 2),
        (ColmapDataParserConfig(load_3D_points=False, eval_mode="fraction"), 2, 0),
    ],
)
def test_small_captures_are_read_in_every_format(tmp_path, parser, views, held_out, capsys):
    data = load(tmp_path, views, parser)
    assert (data.num_views, len(data.eval_dataset)) == (views - held_out, held_out)
    printed = "No view is held out: metrics of held-out views are left out."
    assert (printed in capsys.readouterr().out) == (held_out == 0)
    cameras = data.eval_dataset.cameras
    if held_out == 0:
        sentence = sentence_of(lambda: cameras.to("cpu"))
        assert sentence == "wys: No view is held out: --split train renders the training views instead."
    else:
        assert len(data.next_eval(0)[0]) == 64 and len(cameras.to("cpu")) == held_out
    if held_out < 2:
        sentence = sentence_of(cameras.get_intrinsics_matrices)
        assert "Fewer than two views are held out: --pose-source train interpolates between" in sentence
    else:
        assert cameras.get_intrinsics_matrices().shape == (held_out, 3, 3)
    # `ns-render spiral` starts at this view.
    assert data.eval_dataloader.get_camera(0)[1]["image"].shape == (32, 40, 3)


def test_a_capture_of_which_one_view_is_left_is_refused(tmp_path):
    with pytest.raises(WysError, match='Only one view of ".*colmap" is left for training: change its .*--eval-mode'):
        load(tmp_path, 2, ColmapDataParserConfig(load_3D_points=False))
