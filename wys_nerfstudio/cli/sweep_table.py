"""Files of a sweep: its input list of edits, its table of results, and the request that its folder belongs to."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional

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


def edit_file(case: int, mask_threshold: float, image_guidance_scale: float) -> str:
    """Return the path of an edited image, relative to the sweep's folder."""
    return f"edits/{case:03d}_tau_{mask_threshold:g}_si_{image_guidance_scale:g}.png"


def grid_file(case: int) -> str:
    """Return the path of a case's grid, relative to the sweep's folder."""
    return f"grids/{case:03d}.png"


def sweep_request(cases: Sequence[SweepCase], settings: dict[str, Any]) -> str:
    """Return the content of `sweep.json`: everything that the table depends on.

    Args:
        cases: The sweep's edits.
        settings: Everything else that the table depends on.
    """
    digests = [hashlib.sha256(case.image.read_bytes()).hexdigest() for case in cases]
    request = {
        "cases": [{**asdict(case), "image": case.image.name, "sha256": digest} for case, digest in zip(cases, digests)],
        "settings": settings,
    }
    return json.dumps(request, indent=1, ensure_ascii=False)


def finished_rows(folder: Path, request: str) -> list[SweepResult]:
    """Return the results of the edits that are finished: those with a row in the table and an image that can be read.

    Args:
        folder: The sweep's folder.
        request: Result of `sweep_request`.

    Raises:
        WysError: If the folder holds another sweep, or one whose request is unknown.
    """
    file, table = folder / REQUEST, folder / TABLE
    if not file.is_file() and not table.is_file():
        return []
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise WysError(
            f'"{folder}" contains a sweep whose {REQUEST} is missing or damaged: give -o another folder, or delete it.'
        ) from error
    if stored != json.loads(request):
        raise WysError(
            f'"{folder}" contains a sweep with another list or other settings: give -o another folder, or delete it.'
        )
    if not table.is_file():
        return []
    try:
        lines = list(csv.DictReader(io.StringIO(table.read_text("utf8", errors="replace"), newline="")))
    except csv.Error:
        return []
    rows = (_read_row(line) for line in lines)
    return [row for row in rows if row is not None and row.file == edit_file(*row.key) and _is_image(folder / row.file)]


def _read_row(line: dict[str, str]) -> Optional[SweepResult]:
    """Return a row of the table; None if the line is damaged."""
    try:
        return SweepResult(**{option.name: option.type(line[option.name]) for option in fields(SweepResult)})  # type: ignore
    except (KeyError, TypeError, ValueError):
        return None


def _is_image(file: Path) -> bool:
    try:
        read_image(file)
    except WysError:
        return False
    return True


def write_table(folder: Path, rows: Sequence[SweepResult]) -> None:
    """Write the table atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SweepResult)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(folder / TABLE, text.getvalue())
