"""Finding, reading and writing checkpoints, and loading base runs; no file of a run folder can execute code."""

import errno
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.models.nerfacto import NerfactoModelConfig
from test_model import SIZES, VIEWS, build

from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.base_run import load_base
from wys_nerfstudio.training.checkpoint import (
    checkpoint_name,
    copy_to_cpu,
    find_checkpoint,
    is_wys,
    model_state,
    read_checkpoint,
    register_safe_globals,
    run_folder,
    save_checkpoint_file,
)
from wys_nerfstudio.training.run_options import read_run_config
from wys_nerfstudio.utils.errors import WysError

TRANSFORM = {"transform": [[1.0, 0, 0, 0.5], [0, 1.0, 0, 0], [0, 0, 1.0, 0]], "scale": 0.25}


def write_run(folder: Path, state: dict[str, torch.Tensor], step: int = 9, config: object = None) -> Path:
    """Write a run folder as nerfstudio does."""
    (folder / "nerfstudio_models").mkdir(parents=True, exist_ok=True)
    checkpoint = {"step": step, "pipeline": {f"_model.{key}": value for key, value in state.items()}}
    torch.save(checkpoint, folder / "nerfstudio_models" / f"step-{step:09d}.ckpt")
    (folder / "config.yml").write_text(yaml.dump(config or {"method_name": "nerfacto"}))
    (folder / "dataparser_transforms.json").write_text(json.dumps(TRANSFORM))
    return folder


def nerfacto_state(model: WysModel) -> dict[str, torch.Tensor]:
    """Return the scene as nerfacto saves it, LPIPS included, with 0.5 added to every float."""
    state = {k: v + 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items() if "relevance" not in k}
    return {**state, "lpips.net.net.slice1.0.weight": torch.zeros(4)}


# ----------------------------------------------------------------------------------------------------------------- reading


def test_the_newest_checkpoint_is_found_from_any_path_of_a_run(tmp_path):
    run = write_run(tmp_path / "run", {}, step=9)
    write_run(run, {}, step=20000)
    newest, older = (run / "nerfstudio_models" / f"step-{step:09d}.ckpt" for step in (20000, 9))
    for path in (run, run / "config.yml", run / "nerfstudio_models", newest):
        assert find_checkpoint(path, "--base-run") == newest
    assert find_checkpoint(older, "--base-run") == older
    assert run_folder(newest) == run


@pytest.mark.parametrize("name", ["nothing", "empty", "empty/file.txt", "gone.ckpt"])
def test_a_path_without_a_checkpoint_is_refused_with_its_option(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.txt").touch()
    sentence = (
        f'No checkpoint found in "{tmp_path / name}": --load-dir takes the folder or the config.yml of a finished'
    )
    with pytest.raises(WysError, match=sentence):
        find_checkpoint(tmp_path / name, "--load-dir")


class Malicious:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_a_checkpoint_with_a_pickled_object_is_refused(tmp_path):
    path, proof = tmp_path / "step-000000001.ckpt", tmp_path / "proof"
    torch.save({"step": 1, "pipeline": {}, "optimizers": Malicious(proof)}, path)
    with pytest.raises(WysError, match=f'checkpoint "{path}" could not be read'):
        read_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # an unsafe loader executes it


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x04garbage", pickle.dumps({"step": 1})[:-3]])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "step-000000001.ckpt"
    path.write_bytes(content)
    with pytest.raises(WysError, match="could not be read"):
        read_checkpoint(path)


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    path, random = tmp_path / "step-000000001.ckpt", np.random.default_rng(0)
    written = {"step": 1, "pipeline": {"_model.a": torch.rand(30), "_model.b": torch.arange(9)}, "lr": 0.25}
    torch.save(written, path)
    content, refused = path.read_bytes(), 0
    flips = [(position, int(random.integers(1, 256))) for position in range(0, len(content), 4)]
    # The attributes of the zip file's entries: torch reads other content for a folder.
    flips += [(entry.start() + 38, 0x10) for entry in re.finditer(b"PK\x01\x02", content)]
    for position, bits in flips:
        flipped = bytearray(content)
        flipped[position] ^= bits
        path.write_bytes(flipped)
        try:
            read = read_checkpoint(path)
        except WysError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            weights = read.pop("pipeline")
            assert read == {"step": 1, "lr": 0.25} and weights.keys() == written["pipeline"].keys()
            assert all(torch.equal(weights[key], value) for key, value in written["pipeline"].items())
    assert refused > len(content) / 16


def test_a_newest_checkpoint_with_a_flipped_byte_is_skipped(tmp_path, capsys):
    weights = {"a": torch.ones(10000)}
    newest = (
        write_run(write_run(tmp_path, weights, step=5), weights, step=10) / "nerfstudio_models" / checkpoint_name(10)
    )
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert find_checkpoint(tmp_path, "--load-dir").name == checkpoint_name(5)
    assert "is damaged" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("content", [[1, 2], {"step": 1}, {"pipeline": {}}])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(WysError, match='x.ckpt" is not a nerfstudio checkpoint: it has no entry "pipeline"'):
        read_checkpoint(tmp_path / "x.ckpt")


def test_numpy_learning_rates_are_read(tmp_path):
    register_safe_globals()
    state = {"step": 1, "pipeline": {}, "schedulers": {"fields": {"_last_lr": [np.float64(0.0123)]}}}
    torch.save(state, tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt")["schedulers"]["fields"]["_last_lr"] == [0.0123]


def test_model_state_strips_prefixes_and_drops_other_parts():
    one, two = torch.zeros(1), torch.ones(1)
    pipeline = {"_model.field.a": one, "_model.module.field.b": two, "datamanager.c": one}
    assert model_state({"pipeline": pipeline}) == {"field.a": one, "field.b": two}


def test_a_wys_run_is_recognized_by_its_relevance_head():
    assert is_wys({"pipeline": {f"_model.{key}": value for key, value in build().state_dict().items()}})
    assert not is_wys({"pipeline": {f"_model.{key}": value for key, value in nerfacto_state(build()).items()}})


# -------------------------------------------------------------------------------------------------------------- config.yml


def test_a_config_is_read_as_plain_data(tmp_path):
    config = NerfactoModelConfig(log2_hashmap_size=17)
    (tmp_path / "config.yml").write_text(
        yaml.dump({"method_name": "nerfacto", "pipeline": {"model": config}, "data": tmp_path, "pair": (1, 2)})
    )
    plain = read_run_config(tmp_path)
    assert plain["method_name"] == "nerfacto"
    assert plain["pipeline"]["model"]["log2_hashmap_size"] == 17
    assert plain["pipeline"]["model"]["implementation"] == config.implementation
    assert plain["pair"] == [1, 2]
    assert Path(*plain["data"]) == tmp_path  # a list of its parts, from Python 3.13 on the whole path


@pytest.mark.parametrize(
    "line",
    [
        '!!python/object/apply:os.mkdir ["{proof}"]',
        '!!python/object/new:os.mkdir ["{proof}"]',
        "!!python/object/apply:os.mkdir {{args: [{proof}]}}",
    ],
)
def test_nothing_in_a_config_is_executed(tmp_path, line):
    proof = tmp_path / "proof"
    text = f"method_name: nerfacto\npipeline: {line.format(proof=proof)}\n"
    (tmp_path / "config.yml").write_text(text)
    assert read_run_config(tmp_path)["method_name"] == "nerfacto"
    assert not proof.exists()
    yaml.load(text, Loader=yaml.UnsafeLoader)
    assert proof.exists()  # an unsafe loader executes it


def test_a_missing_config_is_empty(tmp_path):
    assert read_run_config(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not contain the options of a run"),
        (b"[1, 2]", "does not contain the options of a run"),
        (b"just words", "does not contain the options of a run"),
        (b"{unclosed", "cannot be read: while parsing"),
        (b"? [1, 2]\n: 3", "cannot be read: while constructing a mapping"),
        (b"method_name: \xff\xfe", "cannot be read: 'utf-8' codec"),
        (b"a: \0", "cannot be read: unacceptable character"),
        (b"a: 2025-99-99", "cannot be read: month must be in"),
        (b"[" * 500, "cannot be read: maximum recursion depth exceeded"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.yml").write_bytes(content)
    with pytest.raises(WysError, match=f'config.yml" {message}') as error:
        read_run_config(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_config_without_permission_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.yml").touch()

    def refuse(*_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(WysError, match="config.yml. cannot be read: Permission denied. Restore"):
        read_run_config(tmp_path)


# --------------------------------------------------------------------------------------------------------------- base runs


@pytest.mark.parametrize("poses", ["off", "SO3xR3"])
def test_a_nerfacto_base_replaces_the_scene_alone(tmp_path, poses):
    model = build(camera_optimizer=CameraOptimizerConfig(mode=poses))
    state, before = nerfacto_state(model), {k: v.clone() for k, v in model.state_dict().items()}
    load_base(model, write_run(tmp_path, state), TRANSFORM)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if "relevance" in key or key not in state else state[key]), key
    assert torch.equal(model.field.mlp_head.layers[0].weight, state["field.mlp_head.layers.0.weight"])


def test_a_wys_base_replaces_the_scene_alone(tmp_path):
    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        other.field.relevance_hull.relevance.fill_(0.5)
    head = [p.clone() for p in model.field.relevance_parameters()]
    load_base(model, write_run(tmp_path, other.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(model.field.scene_parameters(), other.field.scene_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.field.relevance_parameters(), head))
    assert not model.field.relevance_hull.known


def test_a_base_with_another_relevance_input_is_loaded(tmp_path):
    other = build(relevance_input="geometry")
    model = build(relevance_input="hashgrid")
    with torch.no_grad():
        for parameter in other.field.scene_parameters():
            parameter.add_(1)
    load_base(model, write_run(tmp_path, other.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(model.field.scene_parameters(), other.field.scene_parameters()))


def test_learned_poses_need_a_camera_optimizer_in_this_run(tmp_path):
    with_poses, without = (build(camera_optimizer=CameraOptimizerConfig(mode=mode)) for mode in ("SO3xR3", "off"))
    fresh = build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    with torch.no_grad():
        with_poses.camera_optimizer.pose_adjustment.fill_(0.25)
    load_base(fresh, write_run(tmp_path / "a", with_poses.state_dict()))
    assert bool((fresh.camera_optimizer.pose_adjustment == 0.25).all())
    sentence = "has learned pose corrections, which this run would drop.*: add --pipeline.model.camera-optimizer.mode"
    assert_refused(without, write_run(tmp_path / "b", with_poses.state_dict()), sentence)
    other_mode = config_of(camera_optimizer={"mode": "SE3"})
    sentence = "would drop or misread: add --pipeline.model.camera-optimizer.mode SE3"
    assert_refused(fresh, write_run(tmp_path / "c", with_poses.state_dict(), config=other_mode), sentence)


def assert_refused(model: WysModel, run: Path, sentence: str, transform: dict | None = None) -> None:
    """Assert that the run is refused with an error that names it, and that the model is unchanged."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WysError, match=sentence) as error:
        load_base(model, run, transform)
    assert f'"{run}"' in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_tiny_cuda_nn_run_is_refused_with_two_remedies(tmp_path):
    state = nerfacto_state(build())
    state = {k: v for k, v in state.items() if not k.startswith("field.mlp_base.")}
    state["field.mlp_base.model.params"] = torch.zeros(1000)
    sentence = "tiny-cuda-nn.*Install it and add --pipeline.model.implementation tcnn, or .*--pipeline.model.implementation torch"
    assert_refused(build(), write_run(tmp_path, state), sentence)


def test_a_tiny_cuda_nn_hash_grid_alone_is_refused_too(tmp_path):
    state = nerfacto_state(build())
    del state["field.mlp_base.model.0.hash_table"]
    state["field.mlp_base.model.0.tcnn_encoding.params"] = torch.zeros(1000)
    assert_refused(build(), write_run(tmp_path, state), "tiny-cuda-nn.*Install it")


def test_a_tiny_cuda_nn_run_is_a_base_where_it_is_installed(tcnn, tmp_path):
    model, state = build(implementation="tcnn"), nerfacto_state(build(implementation="tcnn"))
    load_base(model, write_run(tmp_path, state))
    assert "field.mlp_base.model.params" in state
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if not key.startswith("lpips"))


def test_a_run_without_tiny_cuda_nn_is_refused_with_it(tcnn, tmp_path):
    run = write_run(tmp_path, nerfacto_state(build()), config=config_of(implementation="tcnn"))
    sentence = "was trained without tiny-cuda-nn: add --pipeline.model.implementation torch"
    assert_refused(build(implementation="tcnn"), run, sentence)


def config_of(**model: object) -> dict:
    """Return the config.yml of a nerfacto run as data."""
    return {"method_name": "nerfacto", "pipeline": {"model": {**SIZES, **model}}}


def test_other_shapes_are_refused_with_the_flags_of_the_base(tmp_path):
    other = build(hidden_dim_color=16, log2_hashmap_size=9)
    run = write_run(tmp_path, nerfacto_state(other), config=config_of(hidden_dim_color=16, log2_hashmap_size=9))
    flags = "--pipeline.model.log2-hashmap-size 9 --pipeline.model.hidden-dim-color 16"
    assert_refused(
        build(),
        run,
        f"not a scene of this shape: field.* there and .* here. Give this run that run's settings: {flags}",
    )


def test_other_parts_are_refused_with_the_flags_of_the_base(tmp_path):
    other = build(use_appearance_embedding=False)
    run = write_run(tmp_path, nerfacto_state(other), config=config_of(use_appearance_embedding=False))
    sentence = "embedding_appearance.* is only in this model.*--pipeline.model.use-appearance-embedding False"
    assert_refused(build(), run, sentence)


@pytest.mark.parametrize("config", [{"method_name": "splatfacto"}, {"method_name": "splatfacto", "pipeline": "odd"}])
def test_a_run_of_another_method_is_refused_with_its_name(tmp_path, config):
    run = write_run(tmp_path, {"gauss_params.means": torch.zeros(5, 3)}, config=config)
    assert_refused(
        build(), run, "not a scene of this shape.*--base-run takes a nerfacto or wys run.* this is a splatfacto run"
    )


def test_renamed_weights_are_refused_with_the_first_name(tmp_path):
    state = nerfacto_state(build())
    state["field.aaa"] = state.pop("field.mlp_head.layers.0.weight")
    assert_refused(build(), write_run(tmp_path, state), "field.aaa is only in that run")


def test_another_number_of_views_is_refused(tmp_path):
    state = nerfacto_state(build())
    state["field.embedding_appearance.embedding.weight"] = torch.zeros(VIEWS + 3, 4)
    sentence = f"trained on {VIEWS + 3} views and this data has {VIEWS}: use the same --data"
    assert_refused(build(), write_run(tmp_path, state), sentence)


def test_another_number_of_poses_is_refused(tmp_path):
    model = build(camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"), use_appearance_embedding=False)
    state = nerfacto_state(model)
    state["camera_optimizer.pose_adjustment"] = torch.zeros(VIEWS - 1, 6)
    assert_refused(model, write_run(tmp_path, state), f"trained on {VIEWS - 1} views and this data has {VIEWS}")


def test_another_grid_resolution_of_equal_shape_is_refused(tmp_path):
    run = write_run(tmp_path, nerfacto_state(build(max_res=64)))
    assert_refused(build(), run, "field.max_res 64 and this model 32: .*--pipeline.model.max-res 64")
    proposals = [{**arguments, "max_res": 8} for arguments in SIZES["proposal_net_args_list"]]
    run = write_run(tmp_path / "proposals", nerfacto_state(build(proposal_net_args_list=proposals)))
    assert_refused(
        build(), run, "proposal_networks.0.*max_res 8 and this model 16: .*--pipeline.model.proposal-net-args-list"
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("base_res", 8),
        ("average_init_density", 0.01),
        ("disable_scene_contraction", True),
        ("background_color", "white"),
    ],
)
def test_settings_without_weights_are_compared_in_config_yml(tmp_path, option, value):
    run = write_run(tmp_path, nerfacto_state(build()), config=config_of(**{option: value}))
    flag = f"--pipeline.model.{option.replace('_', '-')} {value}"
    assert_refused(build(), run, f"other settings than this run: add {flag}")


@pytest.mark.parametrize("change", [{"scale": 0.26}, {"transform": [[1.0, 0, 0, 0.6], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]}])
def test_another_transform_of_the_cameras_is_refused(tmp_path, change):
    sentence = "has its cameras in another place or scale: use the same --data"
    assert_refused(build(), write_run(tmp_path, nerfacto_state(build())), sentence, {**TRANSFORM, **change})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"7", b"{}", b'{"scale": "x", "transform": 3}',
                                     b'{"scale": 0.25, "transform": [[1, 2], [3]]}', b"[" * 100000])  # fmt: skip
def test_a_damaged_transform_of_a_base_is_refused(tmp_path, content):
    run = write_run(tmp_path, nerfacto_state(build()))
    (run / "dataparser_transforms.json").write_bytes(content)
    assert_refused(
        build(),
        run,
        "cameras of the base run .* cannot be compared .*, because .dataparser_transforms.json. is damaged",
        TRANSFORM,
    )


# ----------------------------------------------------------------------------------------------------------------- writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("only_latest", [True, False])
def test_the_newest_two_checkpoints_are_kept(tmp_path, only_latest):
    folder = tmp_path / "nerfstudio_models"
    for step in (5, 20, 7, 1000000000):  # after 20 the run was resumed at 5
        save_checkpoint_file(folder, {"step": step, "pipeline": {}}, only_latest)
    kept = (7, 1000000000) if only_latest else (5, 7, 20, 1000000000)
    assert set(names(folder)) == {checkpoint_name(step) for step in kept}
    assert list((tmp_path / "wys").iterdir()) == []


def test_checkpoints_of_abandoned_steps_are_removed(tmp_path):
    folder = tmp_path / "nerfstudio_models"
    for step in (5, 10, 7):
        save_checkpoint_file(folder, {"step": step, "pipeline": {}}, only_latest=True)
    assert names(folder) == [checkpoint_name(5), checkpoint_name(7)]


def test_damaged_newest_checkpoints_are_skipped_with_a_message(tmp_path, capsys):
    run = write_run(write_run(write_run(tmp_path, {}, step=5), {}, step=10), {}, step=20)
    folder = run / "nerfstudio_models"
    content = (folder / checkpoint_name(20)).read_bytes()
    (folder / checkpoint_name(20)).write_bytes(content[: len(content) // 2])
    (folder / checkpoint_name(10)).write_bytes(b"")
    assert find_checkpoint(run, "--load-dir") == folder / checkpoint_name(5)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("could not be read") == printed.count("The previous one is used.") == 2
    (folder / checkpoint_name(5)).write_bytes(content[:9])
    with pytest.raises(WysError, match="could not be read"):
        read_checkpoint(find_checkpoint(run, "--load-dir"))


def test_an_older_checkpoint_is_found_by_its_step(tmp_path):
    run = write_run(write_run(tmp_path, {}, step=5), {}, step=10)
    assert find_checkpoint(run, "--load-dir", 5).name == checkpoint_name(5)
    with pytest.raises(WysError, match="No checkpoint of step 7 found .*--load-step can be 10, 5"):
        find_checkpoint(run, "--load-dir", 7)


def test_copies_keep_their_values_and_shared_tensors() -> None:
    weight = torch.rand(3)
    state = {"a": weight, "b": [weight, {"c": torch.ones(2)}], "d": (1, "x")}
    copy = copy_to_cpu(state)
    expected = weight.clone()
    weight.zero_()
    assert torch.equal(copy["a"], expected) and copy["b"][0] is copy["a"]
    assert copy["b"][1]["c"].tolist() == [1, 1] and copy["d"] == (1, "x")
