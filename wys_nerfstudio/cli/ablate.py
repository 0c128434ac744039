"""`wys ablate`: the paper's ablations on the demo scene."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


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
