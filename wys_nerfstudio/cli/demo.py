"""`wys demo`: the whole method on the demo scene."""

from dataclasses import dataclass
from pathlib import Path


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
