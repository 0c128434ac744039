"""The `wys` command: what the method offers beside ns-train, one subcommand each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

import tyro

from wys_nerfstudio.errors import WysError


@dataclass
class Demo:
    """Makes the demo scene, edits it with wys-tiny and the embedded editor, and shows what came of it. Needs no network
    and no GPU."""

    output: Path = Path("wys-demo")
    """Folder for scene, run, pictures and figures."""
    instruction: str = "turn the bear into a panda"
    """What to change; the embedded editor knows a bear, a ball and a block."""
    recipe: Path | None = None
    """YAML file of further ns-train options."""

    def main(self) -> None:
        """Runs the demo."""
        from wys_nerfstudio.demo.run import run_demo

        run_demo(self.output, self.instruction, self.recipe)


@dataclass
class DemoScene:
    """Writes a scene of the toy world in nerfstudio's format, with the ground truth of every edit beside it."""

    output: tyro.conf.Positional[Path]
    """Folder to write."""
    seed: int = 0
    """Which scene; 0 is the demo's."""
    width: int = 80
    """Width of the views in pixels."""
    height: int = 64
    """Height of the views in pixels."""
    views: int = 48
    """Number of views."""

    def main(self) -> None:
        """Writes the scene."""
        from wys_nerfstudio.demo.scene import write_demo_scene

        try:
            write_demo_scene(self.output, seed=self.seed, width=self.width, height=self.height, num_views=self.views)
        except ValueError as error:
            raise WysError(str(error)) from error
        print(
            f'Wrote {self.views} views to {self.output}. Edit them: ns-train wys-tiny --data {self.output} --instruction "..."'
        )


Command = Union[
    Annotated[Demo, tyro.conf.subcommand("demo")],
    Annotated[DemoScene, tyro.conf.subcommand("demo-scene")],
]


def entrypoint() -> None:
    """Entry point of the `wys` console script."""
    command = tyro.cli(Command, prog="wys", description=__doc__)  # type: ignore
    try:
        command.main()
    except WysError as error:
        raise SystemExit(f"wys: {error}") from error


if __name__ == "__main__":
    entrypoint()
