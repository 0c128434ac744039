"""Options of other runs: read from their config.yml and compared with those of this run.

A run's config.yml is a pickle in YAML syntax. Here it is only read as plain data: its tags are ignored, nothing is executed.
"""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from nerfstudio.configs.dataparser_configs import all_dataparsers

from wys_nerfstudio.utils.errors import WysError

SHAPE_OPTIONS = (
    "num_levels",
    "base_res",
    "max_res",
    "log2_hashmap_size",
    "features_per_level",
    "hidden_dim",
    "hidden_dim_color",
    "appearance_embed_dim",
    "use_appearance_embedding",
    "num_proposal_iterations",
    "use_same_proposal_network",
    "proposal_net_args_list",
    "implementation",
)
"""Options of the model that decide the shapes of a checkpoint."""

UNSEEN_OPTIONS = ("base_res", "average_init_density", "disable_scene_contraction", "background_color")
"""Options of the model that no key or shape of a checkpoint shows, but that change the meaning of its weights."""

# Another backend has a sentence of its own.
RESUMED_OPTIONS = (
    *(option for option in SHAPE_OPTIONS if option != "implementation"),
    *(option for option in UNSEEN_OPTIONS if option not in SHAPE_OPTIONS),
    "relevance_input",
    "camera_optimizer.mode",
)
"""Options of the model that a resumed run keeps."""

FREE_OPTIONS = ("data", "load_3D_points", "depth_unit_scale_factor")
"""Options of dataparsers that change neither views nor cameras."""


class _PlainLoader(yaml.SafeLoader):
    """Reads a config.yml as nested dicts and lists, whatever Python objects its tags name."""


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return suffix.removeprefix("name:") if suffix.startswith("name:") else loader.construct_scalar(node)  # type: ignore


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return a run's config.yml as plain data; empty if there is none.

    Raises:
        WysError: If it cannot be read or is not a mapping.
    """
    path = folder / "config.yml"
    if not path.is_file():
        return {}
    try:
        config = yaml.load(path.read_text("utf8"), Loader=_PlainLoader)
    # Overlong numbers, invalid dates and the like raise other errors than YAMLError.
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise WysError(f'"{path}" cannot be read: {reason.rstrip(".")}. Restore that run\'s options.') from error
    if not isinstance(config, dict):
        raise WysError(f'"{path}" does not contain the options of a run: restore that file.')
    return config


def differing_flags(config: dict[str, Any], model: Any, names: Iterable[str]) -> list[str]:
    """Return those options of the model, as typed, in which a run differs from this one.

    Args:
        config: Result of `read_run_config`.
        model: This run's options of the model.
        names: Names of the options.
    """
    return _different("--pipeline.model.", _part(config, "pipeline", "model"), _as_plain(model), names)


def check_resumed_options(run: Path, config: dict[str, Any], options: Any) -> None:
    """Refuse to resume a run with another model, other cameras or other views.

    Args:
        run: The run that is resumed.
        config: Result of `read_run_config`.
        options: This run's options, a `WysTrainerConfig`.

    Raises:
        WysError: If an option differs that must stay.
    """
    manager = options.pipeline.datamanager
    flags = differing_flags(config, options.pipeline.model, RESUMED_OPTIONS)
    method = config.get("method_name")
    if flags and isinstance(method, str) and method != options.method_name:
        raise WysError(f'The run "{run}" is a {method} run: resume it with ns-train {method}.')
    theirs = _part(config, "pipeline", "datamanager")
    current = {"camera_res_scale_factor": manager.camera_res_scale_factor}
    flags += _different("--pipeline.datamanager.", theirs, current, current)
    add = [f"add {' '.join(flags)}"] if flags else []
    parser = _dataparser_flags(_part(config, "pipeline", "datamanager", "dataparser"), _as_plain(manager.dataparser))
    add += [f"end the command with {parser}"] if parser else []
    if add:
        raise WysError(f'The run "{run}" was trained with other options: {" and ".join(add)}.')


def _dataparser_flags(theirs: dict[str, Any], current: dict[str, Any]) -> str:
    """Return the options of the run's dataparser, as typed, if they differ from this run's."""
    targets = {name: _as_plain(parser)["_target"] for name, parser in all_dataparsers.items()}
    name = next((name for name, target in targets.items() if target == theirs.get("_target")), "")
    if theirs.get("_target", current["_target"]) != current["_target"]:
        return name
    compared = [option for option in current if option not in ("_target", *FREE_OPTIONS)]
    flags = _different("--", theirs, current, compared)
    return " ".join([name, *flags]) if flags else ""


def _part(config: Any, *names: str) -> dict[str, Any]:
    """Return a part of a config.yml; empty if there is none."""
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def _as_plain(options: Any) -> dict[str, Any]:
    """Return options as they are read from a config.yml."""
    return yaml.load(yaml.dump(options), Loader=_PlainLoader)


def _different(prefix: str, theirs: dict[str, Any], current: dict[str, Any], names: Iterable[str]) -> list[str]:
    flags = []
    for name in names:
        now = _leaves(current, name)
        for leaf, value in _leaves(theirs, name).items():
            if leaf in now and value != now[leaf]:
                flags.append(f"{prefix}{leaf.replace('_', '-')} {_typed(value)}")
    return flags


def _leaves(options: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an option by its name as typed; a list of mappings has one name per number."""
    owner, _, last = name.rpartition(".")
    options = _part(options, *owner.split(".")) if owner else options
    if last not in options:
        return {}
    value = options[last]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return {f"{name}.{i}.{key}": leaf for i, part in enumerate(value) for key, leaf in part.items()}
    return {name: value}


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))
