"""Local editing of images and 3D scenes: check of the machine, demo, image edits, masks, sweeps, ablations, comparisons, exports."""

from typing import Annotated, Union

import tyro

from wys_nerfstudio.cli.ablate import Ablate
from wys_nerfstudio.cli.check import Check
from wys_nerfstudio.cli.compare import Compare
from wys_nerfstudio.cli.demo import Demo
from wys_nerfstudio.cli.demo_pictures import DemoPictures
from wys_nerfstudio.cli.demo_scene import DemoScene
from wys_nerfstudio.cli.edit_image import EditImage
from wys_nerfstudio.cli.export import Export
from wys_nerfstudio.cli.make_masks import MakeMasks
from wys_nerfstudio.cli.sweep import Sweep
from wys_nerfstudio.training.interrupts import DISK_ERRORS
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import convert_memory_errors

Command = Union[
    Annotated[Check, tyro.conf.subcommand("check")],
    Annotated[Demo, tyro.conf.subcommand("demo")],
    Annotated[DemoScene, tyro.conf.subcommand("demo-scene")],
    Annotated[DemoPictures, tyro.conf.subcommand("demo-pictures")],
    Annotated[EditImage, tyro.conf.subcommand("edit-image")],
    Annotated[MakeMasks, tyro.conf.subcommand("make-masks")],
    Annotated[Sweep, tyro.conf.subcommand("sweep")],
    Annotated[Ablate, tyro.conf.subcommand("ablate")],
    Annotated[Compare, tyro.conf.subcommand("compare")],
    Annotated[Export, tyro.conf.subcommand("export")],
]


def run() -> None:
    """Parse the command line and run the command.

    Raises:
        SystemExit: With a sentence, for errors that the user can correct.
        KeyboardInterrupt: After Ctrl-C; the message says how to continue.
    """
    command = tyro.cli(Command, prog="wys", description=__doc__)  # type: ignore
    try:
        with convert_memory_errors("in this command", lambda: "end other programs that use its memory."):
            command.main()
    except WysError as error:
        raise SystemExit(f"wys: {error}") from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        file = f'"{error.filename}"' if error.filename else "A file"
        raise SystemExit(f"wys: {file} could not be written: {error.strerror}.") from error
    except KeyboardInterrupt as error:
        if isinstance(command, (MakeMasks, Sweep, Ablate)):
            raise KeyboardInterrupt("Stopped; the same wys command continues.") from error
        raise
