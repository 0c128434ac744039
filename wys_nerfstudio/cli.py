"""The `wys` command: what the method offers beside ns-train, one subcommand each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Union

import tyro

from wys_nerfstudio.editing import LocalEditSettings
from wys_nerfstudio.errors import WysError
from wys_nerfstudio.quiet import ignore_warnings
from wys_nerfstudio.sweep import SweepSettings


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


@dataclass
class DemoPictures:
    """Writes pictures of the toy world that its editor has never seen, and list.csv with an edit for each, for wys sweep."""

    output: tyro.conf.Positional[Path]
    """Folder to write."""
    count: int = 12
    """Number of pictures."""

    def main(self) -> None:
        """Writes the pictures."""
        from wys_nerfstudio.demo.pictures import write_demo_pictures

        print(
            f"Wrote {self.count} pictures. Edit them: wys sweep {write_demo_pictures(self.output, self.count)} -o OUT "
            "--editor embedded --clip embedded"
        )


@dataclass
class EditImage:
    """Edits pictures by an instruction, only where the instruction is about. Beside each edited picture OUT.png come
    OUT_relevance.png, OUT_mask.png and OUT_side_by_side.png; pixels outside the mask are the input's, bit for bit."""

    # One list, because a list of files before the instruction would swallow it.
    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='IN... "INSTRUCTION"')]
    """Pictures (PNG, JPEG, WebP) or folders of pictures, and at last what to change: "turn the bear into a panda"."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """A .png file for a single picture, a folder for several."""
    editor: str = "timbrooks/instruct-pix2pix"
    """InstructPix2Pix-type checkpoint: a hub id, a local folder in diffusers format, or "embedded" for the small editor of
    toy pictures that comes with the package."""
    editor_allow_pickle: bool = False
    """Take an editor's .bin files where it has no safetensors files; torch's weights-only loader reads them."""
    mask: Path | None = None
    """A picture of the input's size, bright where it may be edited, instead of the mask that the relevance map gives."""
    seed: int = 0
    """Seed of the noise; equal seeds give equal edits."""
    device: str | None = None
    """Where the editor runs, such as cuda:1; by default the GPU if there is one, else the CPU."""
    settings: Annotated[LocalEditSettings, tyro.conf.arg(name="")] = field(default_factory=LocalEditSettings)
    """How to edit."""

    def main(self) -> None:
        """Edits the pictures."""
        from wys_nerfstudio.image_edits import edit_files

        if len(self.words) < 2:
            raise WysError(
                'wys edit-image takes pictures and an instruction: wys edit-image IN.png "turn the bear into a panda" '
                "-o OUT.png."
            )
        *inputs, instruction = self.words
        outputs = edit_files(
            [Path(path) for path in inputs],
            instruction,
            self.output,
            self.settings,
            editor_name=self.editor,
            allow_pickle=self.editor_allow_pickle,
            mask_file=self.mask,
            seed=self.seed,
            device=self.device,
        )
        print(f"Wrote {', '.join(str(file) for file in outputs)}; the comparison is in *_side_by_side.png.")


@dataclass
class Sweep:
    """Edits a list of pictures over a grid of mask thresholds and image guidance scales, asks CLIP what became of them, and
    draws the trade-off (the paper's Fig. 6, 12 and 13). A sweep that was stopped goes on where it was."""

    edits: tyro.conf.Positional[Path]
    """A .csv, .yaml or .json list with image (from the list's folder on), instruction, caption_before, caption_after."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for sweep.csv, curves.png, grids/ and edits/."""
    editor: str = "timbrooks/instruct-pix2pix"
    """InstructPix2Pix-type checkpoint: a hub id, a local folder in diffusers format, or "embedded"."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP that is asked: a hub id, a local folder, or "embedded" for the toy world's own."""
    seed: int = 0
    """Seed of the noise."""
    device: str | None = None
    """Where editor and CLIP run, such as cuda:1; by default the GPU if there is one, else the CPU."""
    settings: Annotated[SweepSettings, tyro.conf.arg(name="")] = field(default_factory=SweepSettings)
    """The grid, and how to edit."""

    def main(self) -> None:
        """Runs the sweep."""
        from wys_nerfstudio.sweep import run_sweep

        rows = run_sweep(
            self.edits,
            self.output,
            self.settings,
            editor_name=self.editor,
            clip_name=self.clip,
            seed=self.seed,
            device=self.device,
        )
        print(f"{len(rows)} edits; see {self.output}/sweep.csv, {self.output}/curves.png and {self.output}/grids/.")


@dataclass
class Compare:
    """Puts finished wys runs on the same views beside each other: a table of ns-eval's figures, a contact sheet, a chart,
    and of every run a sheet of its relevance field. A single run is shown alone."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders or config.yml files of the runs."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("wys-compare")
    """Folder for comparison.json, contact_sheet.png, chart.png and relevance_A.png, relevance_B.png, ..."""

    def main(self) -> None:
        """Compares the runs."""
        from wys_nerfstudio.compare import compare_runs

        compare_runs(self.runs, self.output)


@dataclass
class Ablate:
    """Repeats the paper's ablations on the demo scene against its ground truth: edits confined by the relevance field, by 2D
    relevance maps, by true masks and by nothing, from one reconstruction. What is there already is not run again."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("wys-ablations")
    """Folder for scene, runs, ablations.json and contact_sheet.png."""
    instruction: str = "turn the bear into a panda"
    """What to change."""
    seeds: int = 3
    """Runs of each variant."""

    def main(self) -> None:
        """Runs the ablations."""
        from wys_nerfstudio.demo.ablations import run_ablations

        run_ablations(self.output, self.instruction, self.seeds)


Command = Union[
    Annotated[Demo, tyro.conf.subcommand("demo")],
    Annotated[DemoScene, tyro.conf.subcommand("demo-scene")],
    Annotated[DemoPictures, tyro.conf.subcommand("demo-pictures")],
    Annotated[EditImage, tyro.conf.subcommand("edit-image")],
    Annotated[Sweep, tyro.conf.subcommand("sweep")],
    Annotated[Ablate, tyro.conf.subcommand("ablate")],
    Annotated[Compare, tyro.conf.subcommand("compare")],
]


def entrypoint() -> None:
    """Entry point of the `wys` console script."""
    ignore_warnings()
    command = tyro.cli(Command, prog="wys", description=__doc__)  # type: ignore
    try:
        command.main()
    except WysError as error:
        raise SystemExit(f"wys: {error}") from error


if __name__ == "__main__":
    entrypoint()
