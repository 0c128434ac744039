"""`wys demo`: the complete method on the demo scene."""

from dataclasses import dataclass
from pathlib import Path

from wys_nerfstudio.utils.folder_lock import locked_folder


@dataclass
class Demo:
    """Render the demo scene, edit it with wys-tiny and the embedded editor, and show the result. Requires no network and
    no GPU."""

    output: Path = Path("wys-demo")
    """Folder of the scene, the run, the images and the metrics."""
    instruction: str = "turn the bear into a panda"
    """What to change; the embedded editor is trained on scenes of a bear, a ball and a block."""
    recipe: Path | None = None
    """YAML file of further ns-train options."""

    def main(self) -> None:
        """Run the demo."""
        from wys_nerfstudio.demo.run import run_demo

        with locked_folder(self.output, "the demo"):
            run_demo(self.output, self.instruction, self.recipe)
