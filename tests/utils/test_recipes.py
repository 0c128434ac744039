"""Recipes: which options they may set. Their syntax is tested with the command line."""

from copy import deepcopy
from pathlib import Path

import pytest
from nerfstudio.configs.method_configs import all_methods

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.recipes import check_changes


def check(option: str, value: object) -> None:
    """Check a recipe that sets one option of `wys`."""
    before, after = all_methods["wys"], deepcopy(all_methods["wys"])
    *groups, name = option.split(".")
    config = after
    for group in groups:
        config = config[group] if isinstance(config, dict) else getattr(config, group)
    assert hasattr(config, name)
    setattr(config, name, value)
    check_changes(Path("r.yaml"), before, after)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("output_dir", Path("elsewhere")),
        ("experiment_name", "."),
        ("method_name", "."),
        ("project_name", "x"),
        ("timestamp", "."),
        ("relative_model_dir", Path("..")),
        ("data", Path("elsewhere")),
        ("recipe", Path("other.yaml")),
        ("load_dir", Path("run")),
        ("load_step", 3),
        ("load_config", Path("config.yml")),
        ("load_checkpoint", Path("x.ckpt")),
        ("save_only_latest_checkpoint", False),
        ("vis", "wandb"),
        ("viewer.websocket_host", "0.0.0.0"),
        ("viewer.websocket_port", 80),
        ("viewer.make_share_url", True),
        ("viewer.relative_log_filename", "../x"),
        ("logging.relative_log_dir", Path("..")),
        ("logging.profiler", "pytorch"),
        ("machine.device_type", "cuda:1"),
        ("machine.dist_url", "tcp://example.com:1"),
        ("machine.num_machines", 2),
        ("pipeline.base_run", Path("run")),
        ("pipeline.masks_dir", Path("masks")),
        ("pipeline.niqe_params", Path("x.mat")),
        ("pipeline.editor_allow_pickle", True),
        ("pipeline.editor_device", "cuda:1"),
        ("pipeline.datamanager.data", Path("elsewhere")),
        ("pipeline.datamanager.dataparser.data", Path("elsewhere")),
        ("pipeline.model.lpips_weights", Path("x.pth")),
    ],
)
def test_recipes_set_no_paths_ports_and_programs(option: str, value: object) -> None:
    with pytest.raises(WysError, match=f"sets --{option.replace('_', '-')}, which recipes cannot"):
        check(option, value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_num_iterations", 10),
        ("steps_per_save", 10),
        ("mixed_precision", False),
        ("prompt", "make it snow"),
        ("machine.seed", 7),
        ("pipeline.instruction", "make it snow"),
        ("pipeline.editor", "timbrooks/instruct-pix2pix"),
        ("pipeline.mask_threshold", 0.25),
        ("pipeline.model.num_levels", 4),
        ("pipeline.datamanager.edit_patch_size", 64),
        ("pipeline.datamanager.dataparser.orientation_method", "none"),
        ("optimizers.fields.optimizer.lr", 0.5),
    ],
)
def test_recipes_set_options_of_the_edit_and_its_training(option: str, value: object) -> None:
    check(option, value)
