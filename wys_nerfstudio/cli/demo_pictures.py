"""`wys demo-pictures`: write toy pictures and a list of edits for `wys sweep`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


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
