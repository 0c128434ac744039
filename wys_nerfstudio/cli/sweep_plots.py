"""Plots of a sweep: the trade-off curves of the paper's Fig. 6 and 12, and the grid of edits of Fig. 13."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from wys_nerfstudio.cli.sweep_table import SweepCase, SweepResult
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.utils.image_io import read_image
from wys_nerfstudio.utils.visualization import SOFTWARE, contact_sheet, save_figure, save_png

_CELL = 192
"""Longest side of an image in the grid, in pixels."""


def mean_points(rows: Sequence[SweepResult]) -> dict[float, list[tuple[float, float, float]]]:
    """Return the points of the curves, averaged over all cases.

    Returns:
        A list of (S_I, direction similarity, image similarity) per tau, in the order of the rows.
    """
    curves: dict[float, list[tuple[float, float, float]]] = {}
    for tau in dict.fromkeys(row.mask_threshold for row in rows):
        for scale in dict.fromkeys(row.image_guidance_scale for row in rows):
            point = [row for row in rows if (row.mask_threshold, row.image_guidance_scale) == (tau, scale)]
            direction = sum(row.direction_similarity for row in point) / len(point)
            image = sum(row.image_similarity for row in point) / len(point)
            curves.setdefault(tau, []).append((scale, direction, image))
    return curves


def draw_curves(rows: Sequence[SweepResult], file: Path) -> None:
    """Plot image similarity over direction similarity: a line per tau, a point per S_I; up and to the right is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    curves = mean_points(rows)
    for tau, points in curves.items():
        _, directions, images = zip(*points)
        label = f"τ = {tau:g}" + (" (no mask)" if tau == 0 else "")
        axes.plot(directions, images, marker="o", markersize=4, label=label)
    # All lines have the same image guidance scales, so only one is annotated.
    for scale, direction, image in next(iter(curves.values())):
        axes.annotate(f"{scale:g}", (direction, image), fontsize=7, xytext=(-4, -10), textcoords="offset points")
    cases = len({row.case for row in rows})
    axes.set_xlabel("CLIP text-image direction similarity")
    axes.set_ylabel("CLIP image similarity")
    axes.set_title(f"{cases} edit{'s' if cases > 1 else ''}; small numbers: image guidance scale S_I", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(file, figure, "image and text-image similarity of edits")


def draw_grid(case: SweepCase, rows: Sequence[SweepResult], folder: Path, file: Path) -> None:
    """Draw the edits of one image: a row per tau, a column per S_I, the input on the left.

    Args:
        case: The edit.
        rows: Its results.
        folder: The sweep's folder.
        file: Output file.
    """
    scales = list(dict.fromkeys(row.image_guidance_scale for row in rows))
    captured = _cell(case.image)
    lines = []
    for tau in dict.fromkeys(row.mask_threshold for row in rows):
        edits = [_cell(folder / row.file) for row in rows if row.mask_threshold == tau]
        lines.append((f"tau = {tau:g}: {case.instruction}", [captured, *edits]))
    sheet = contact_sheet(["input", *(f"S_I = {scale:g}" for scale in scales)], lines, min_height=96)
    save_png(file, sheet, f'edited with {SOFTWARE}: "{case.instruction}"')


def _cell(path: Path) -> Float[Tensor, "h w 3"]:
    rgb = read_image(path).rgb
    scale = min(1.0, _CELL / max(rgb.shape[:2]))
    return resize_images(rgb[None], round(rgb.shape[0] * scale), round(rgb.shape[1] * scale))[0]
