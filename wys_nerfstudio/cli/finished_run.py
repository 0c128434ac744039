"""Finished wys runs that a command reads: their config.yml and the state of their newest checkpoint.

As in `ns-eval`, nerfstudio loads a run's config.yml, which can execute code: only give runs from a trusted source.
"""

from pathlib import Path

from wys_nerfstudio.utils.errors import WysError


def find_config(run: Path, command: str) -> Path:
    """Return the config.yml of a wys run; one that is damaged or of another method is refused before nerfstudio loads it.

    Args:
        run: Folder of the run, or the file itself.
        command: The command that reads the run, for the error message.

    Raises:
        WysError: If there is no such file, or it is refused.
    """
    from wys_nerfstudio.training.output_folder import CONFIG_TAG
    from wys_nerfstudio.training.run_options import read_run_config

    config = run / "config.yml" if run.is_dir() else run
    if config.name != "config.yml" or not config.is_file():
        raise WysError(
            f'There is no config.yml in "{run}": {command} takes folders of finished wys runs, for example '
            "outputs/scene/wys/2025-01-01_120000."
        )
    if not config.read_bytes().startswith(CONFIG_TAG.encode()):
        raise WysError(
            f'"{config.parent}" is not a wys run: {command} takes runs of ns-train wys, wys-small or wys-tiny.'
        )
    read_run_config(config.parent)
    return config


def require_outside(output: Path, folder: Path, kind: str = "run") -> None:
    """Refuse an output folder inside a folder that is read.

    Args:
        output: The output folder.
        folder: The folder that is read.
        kind: What it is, for the error message.

    Raises:
        WysError: If it is inside.
    """
    if output.resolve().is_relative_to(folder.resolve()):
        raise WysError(f'-o "{output}" is inside the {kind} "{folder}": give -o another folder.')
