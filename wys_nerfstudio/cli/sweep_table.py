"""Files of a sweep: its input list of edits, its table of results, and the request that its folder belongs to."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from wys_nerfstudio.utils.atomic_io import write_text
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import read_image

COLUMNS = ("image", "instruction", "caption_before", "caption_after")
TABLE = "sweep.csv"
REQUEST = "sweep.json"


@dataclass(frozen=True)
class SweepCase:
    """One edit of a list."""

    image: Path
    """The image file."""
    instruction: str
    """What to change."""
    caption_before: str
    """Caption of the image."""
    caption_after: str
    """Caption of a successful edit."""


@dataclass(frozen=True)
class SweepResult:
    """A row of the table: a case at one threshold and one image guidance scale."""

    case: int
    """Index of the case in the list."""
    image: str
    """File name of its image."""
    instruction: str
    """Its instruction."""
    mask_threshold: float
    """tau."""
    image_guidance_scale: float
    """S_I."""
    direction_similarity: float
    """CLIP text-image direction similarity (x axis of Fig. 6 and 12)."""
    image_similarity: float
    """CLIP similarity to the input (y axis)."""
    text_image_similarity: float
    """CLIP similarity to the caption of the edit."""
    file: str
    """Path of the edited image, relative to the sweep's folder."""

    @property
    def key(self) -> tuple[int, float, float]:
        """Case, tau and S_I."""
        return self.case, self.mask_threshold, self.image_guidance_scale


def read_cases(file: Path) -> list[SweepCase]:
    """Read a list of edits; image paths are relative to the list's folder.

    Args:
        file: A CSV table, or YAML or JSON with a list of mappings, with the columns or keys of COLUMNS.

    Raises:
        WysError: If it cannot be read, is incomplete, or an image cannot be edited.
    """
    usage = f"wys sweep takes a .csv, .yaml or .json list with {', '.join(COLUMNS)}"
    if not file.is_file():
        raise WysError(f'There is no list "{file}": {usage}.')
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix.lower() == ".csv":
            entries: Any = list(csv.DictReader(io.StringIO(text)))
        elif file.suffix.lower() in (".yaml", ".yml", ".json"):
            entries = yaml.safe_load(text)  # JSON is YAML
        else:
            raise WysError(f'"{file}" is not a list of edits: {usage}.')
    except (OSError, ValueError, csv.Error, yaml.YAMLError) as error:
        raise WysError(f'The list "{file}" cannot be read ({" ".join(str(error).split())}): {usage}.') from error
    if not isinstance(entries, list) or not entries:
        raise WysError(f'There are no edits in "{file}": {usage}.')
    cases = []
    for number, entry in enumerate(entries, start=1):
        values = entry if isinstance(entry, dict) else {}
        for column in COLUMNS:
            if not isinstance(values.get(column), str) or not values[column].strip():
                raise WysError(f'Edit {number} of "{file}" has no {column}: {usage}.')
        case = SweepCase(file.parent / values["image"], *(values[column] for column in COLUMNS[1:]))
        read_image(case.image)
        cases.append(case)
    return cases


def open_sweep(folder: Path, cases: Sequence[SweepCase], settings: dict[str, Any]) -> list[SweepResult]:
    """Start a sweep in a folder, or resume the one that is there.

    Args:
        folder: The sweep's folder.
        cases: Its edits.
        settings: Everything else that the table depends on.

    Returns:
        The finished rows.

    Raises:
        WysError: If the folder holds another sweep.
    """
    digests = [hashlib.sha256(case.image.read_bytes()).hexdigest() for case in cases]
    request = {
        "cases": [{**asdict(case), "image": case.image.name, "sha256": digest} for case, digest in zip(cases, digests)],
        "settings": settings,
    }
    text = json.dumps(request, indent=1, ensure_ascii=False)
    file = folder / REQUEST
    if file.is_file():
        if file.read_text("utf8") != text:
            raise WysError(
                f'"{folder}" contains a sweep with another list or other settings: give -o another folder, or delete it.'
            )
    else:
        write_text(file, text)
    if not (folder / TABLE).is_file():
        return []
    with (folder / TABLE).open(encoding="utf8", newline="") as table:
        types = {field.name: field.type for field in fields(SweepResult)}
        lines = csv.DictReader(table)
        return [SweepResult(**{name: types[name](value) for name, value in line.items()}) for line in lines]  # type: ignore


def write_table(folder: Path, rows: Sequence[SweepResult]) -> None:
    """Write the table atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SweepResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(folder / TABLE, text.getvalue())
