"""`wys compare`: metrics and renders of finished runs, and of pictures from other methods, on the same views, side by side.

Relevance fields are rendered from several sides (the paper's Fig. 15).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import tyro
from jaxtyping import Bool
from rich.table import Table
from torch import Tensor

from wys_nerfstudio.cli.finished_run import find_config, require_outside
from wys_nerfstudio.utils.atomic_io import write_json
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.image_io import READABLE, image_size
from wys_nerfstudio.utils.progress import track
from wys_nerfstudio.utils.visualization import (
    SHEET_SIDE,
    SHEET_VIEWS,
    SOFTWARE,
    contact_sheet,
    evenly_spaced,
    limited_size,
    read_png,
    reduce,
    save_figure,
    save_png,
)

if TYPE_CHECKING:
    from wys_nerfstudio.datamanager import WysDataManager
    from wys_nerfstudio.pipeline import WysPipeline

RENDERS = {"rgb": "render", "relevance": "relevance field", "relevance_overlay": "overlay"}
"""Model outputs in contact sheets, and their titles."""


@dataclass
class Compare:
    """Compare finished wys runs, and pictures rendered by other methods, on the same training views: a table of the edit metrics
    of ns-eval, a contact sheet, a chart, and a sheet of each run's relevance field. Also accepts a single run."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders or config.yml files of runs, and folders of pictures: renders of an edited scene by any method from the cameras of
    all training views, at their size, named as the views. Captured views, instruction and captions are those of the first
    run."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("wys-compare")
    """Folder of comparison.json, contact_sheet.png, chart.png and relevance_A.png, relevance_B.png, ..."""
    masks: Optional[Path] = None
    """Folder with one mask per view, named as the views and white where the edit may change them; adds the PSNR outside."""
    retrain: Optional[int] = None
    """Number of steps of a new reconstruction from the edited views of each run; adds its PSNR on edited views that are held out
    of it, a tenth, which measures how consistent the edited views are."""

    def main(self) -> None:
        """Compare the runs."""
        if self.retrain is not None and self.retrain < 1:
            raise WysError(f"--retrain must be at least 1, not {self.retrain}.")
        compare_runs(self.runs, self.output, self.masks, self.retrain)


@dataclass
class Column:
    """What is shown of a run or of a folder of pictures."""

    title: str
    """A letter and the folder's name."""
    folder: Path
    """The folder."""
    metrics: dict[str, float]
    """Means of the metrics over the views."""
    renders: list[dict[str, Tensor]]
    """Images of the views in the contact sheet, by their names in `RENDERS`; of pictures `rgb` only."""


def compare_runs(
    paths: Sequence[Path], output: Path, masks_dir: Optional[Path] = None, retrain_steps: Optional[int] = None
) -> None:
    """Print the metrics and write `comparison.json`, `contact_sheet.png`, `chart.png` and `relevance_A.png` per run.

    Args:
        paths: Folders or config.yml files of finished wys runs on the same views, and folders of pictures of these views.
        output: Output folder.
        masks_dir: Folder with one mask per view, for the PSNR outside the masks.
        retrain_steps: Training steps for the PSNR of `retrained_psnr`; None omits it.

    Raises:
        WysError: If no run is given, a run is of another method, the runs' views differ, a view has no picture or mask, or an input
            would be changed.
    """
    from nerfstudio.utils.eval_utils import eval_setup

    from wys_nerfstudio.cli.retrain import require_retrainable, retrained_psnr
    from wys_nerfstudio.utils.view_masks import read_masks

    configs = {place: find_config(path, "wys compare") for place, path in enumerate(paths) if not has_pictures(path)}
    if not configs:
        given = f'"{paths[0]}" contains pictures: ' if paths else ""
        raise WysError(
            f"{given}wys compare takes one or more runs: wys compare RUN_A RUN_B, or wys compare RUN PICTURES."
        )
    folders = [configs[place].parent if place in configs else path for place, path in enumerate(paths)]
    for place, folder in enumerate(folders):
        require_outside(output, folder, "run" if place in configs else "folder of pictures")  # both contain images
        if retrain_steps is not None and place in configs:
            require_retrainable(folder)
    titles = [f"{chr(ord('A') + place)}: {folder.name}" for place, folder in enumerate(folders)]
    columns: dict[int, Column] = {}
    options: dict[int, Any] = {}
    captured: list[Tensor] = []
    names: list[str] = []
    shown: list[int] = []
    masks = None
    for place, config in configs.items():
        pipeline: Any
        options[place], pipeline, *_ = eval_setup(config, test_mode="test")
        data = pipeline.datamanager
        if not names:
            names = data.view_names
            shown = evenly_spaced(SHEET_VIEWS, len(names))
            captured = [reduce(data.captured_views([view])[0], SHEET_SIDE) for view in shown]
            if masks_dir is not None:
                files = data.train_dataset.image_filenames
                masks = read_masks(masks_dir, files, names, *data.view_size, source="--masks")
            pictures = {i: find_pictures(path, data) for i, path in enumerate(paths) if i not in configs}
            for i, files in pictures.items():
                columns[i] = picture_column(titles[i], folders[i], pipeline, files, shown, masks)
        elif data.view_names != names:
            first = next(iter(configs.values())).parent
            raise WysError(f'"{config.parent}" and "{first}" have different views: compare runs on the same data.')
        columns[place] = run_column(titles[place], config.parent, pipeline, shown, masks)
        del data, pipeline  # their memory is needed
    if retrain_steps is not None:
        for place in configs:
            psnr = retrained_psnr(folders[place], options[place], retrain_steps)
            columns[place].metrics["retrained_psnr"] = psnr
    write_comparison(output, [columns[place] for place in range(len(paths))], captured, [names[view] for view in shown])


def has_pictures(folder: Path) -> bool:
    """Return whether a path is a folder of pictures: it contains images, in sub-folders or not, and is not a run."""
    return (
        folder.is_dir()
        and not (folder / "config.yml").exists()
        and any(path.suffix.lower() in READABLE for path in folder.rglob("*"))
    )


def find_pictures(folder: Path, data: "WysDataManager") -> list[Path]:
    """Return the picture of each training view.

    Args:
        folder: Folder of the pictures; `match_files` defines their names.
        data: The views.

    Raises:
        WysError: If a view has no picture, a picture no view, or one is damaged or has another size than its view.
    """
    from wys_nerfstudio.utils.data_checks import check_image
    from wys_nerfstudio.utils.view_masks import match_files

    views = data.train_dataset.image_filenames
    pictures = match_files(folder, views, data.view_names, "picture", "wys compare", READABLE)
    surplus = {path for path in folder.rglob("*") if path.suffix.lower() in READABLE} - {*pictures}
    if surplus:
        raise WysError(
            f'"{min(surplus)}" is not a picture of a training view: remove it, or name it as one, for example '
            f"{data.view_names[0]}.png."
        )
    height, width = data.view_size
    for view, picture in zip(views, pictures):
        check_image(picture, "the pictures", decode=True)
        size = image_size(picture)
        if size != (width, height):
            raise WysError(
                f'The picture "{picture}" is {size[0]}x{size[1]} and the view {view.name} {width}x{height}: render it at the '
                "size of the view."
            )
    return pictures


def picture_column(
    title: str,
    folder: Path,
    pipeline: "WysPipeline",
    pictures: Sequence[Path],
    shown: Sequence[int],
    masks: Optional[Bool[Tensor, "n h w"]],
) -> Column:
    """Return what is shown of pictures.

    Args:
        title: As in `Column`.
        folder: As in `Column`.
        pipeline: A run on the same views.
        pictures: Result of `find_pictures`.
        shown: Indices of the views in the contact sheet.
        masks: As in `evaluation.evaluate_edit`.
    """
    from wys_nerfstudio.evaluation.evaluate import means

    metrics = means(pipeline.evaluate_edit((read_png(path).to(pipeline.device) for path in pictures), masks))
    return Column(title, folder, metrics, [{"rgb": reduce(read_png(pictures[view]), SHEET_SIDE)} for view in shown])


def run_column(
    title: str, folder: Path, pipeline: "WysPipeline", shown: Sequence[int], masks: Optional[Bool[Tensor, "n h w"]]
) -> Column:
    """Return what is shown of a run; arguments as in `picture_column`."""

    from wys_nerfstudio.evaluation.evaluate import means

    metrics = means(pipeline.evaluate_edit(masks=masks))
    data, renders = pipeline.datamanager, []
    size = limited_size(*data.view_size, SHEET_SIDE)
    for view in track(shown, description="Contact sheet"):
        render = pipeline.scene_model.render_view(data.cameras, view, size)
        renders.append({name: render[name].clamp(0, 1).cpu() for name in RENDERS})
    return Column(title, folder, metrics, renders)


def write_comparison(output: Path, columns: Sequence[Column], captured: Sequence[Tensor], names: Sequence[str]) -> None:
    """Write the files of a comparison and print the metrics.

    Args:
        output: Output folder.
        columns: Runs and pictures.
        captured: Captured views in the contact sheet.
        names: Their names.
    """
    from nerfstudio.utils.rich_utils import CONSOLE

    output.mkdir(parents=True, exist_ok=True)
    titles, metrics = [column.title for column in columns], [column.metrics for column in columns]
    folders = {column.title: str(column.folder) for column in columns}
    write_json(output / "comparison.json", {"runs": folders, "metrics": dict(zip(titles, metrics))})
    rows = [(name, [captured[i], *(column.renders[i]["rgb"] for column in columns)]) for i, name in enumerate(names)]
    about = f"renders of scenes edited with {SOFTWARE}"
    save_png(output / "contact_sheet.png", contact_sheet(["captured", *titles], rows), about)
    for column in columns:
        if column.renders[0].keys() == RENDERS.keys():
            rows = [(name, [captured[i], *column.renders[i].values()]) for i, name in enumerate(names)]
            sheet = contact_sheet(["captured", *RENDERS.values()], rows)
            save_png(output / f"relevance_{column.title[0]}.png", sheet, about)
    _draw_chart(titles, metrics, output / "chart.png")
    CONSOLE.print(metrics_table(titles, metrics))
    CONSOLE.print(f"See contact_sheet.png, chart.png and relevance_*.png in {output}.", markup=False)


def metric_names(metrics: Sequence[dict[str, float]]) -> list[str]:
    """Return the names of all metrics of any run, in order of appearance."""
    return list(dict.fromkeys(name for run in metrics for name in run))


def metrics_table(titles: Sequence[str], metrics: Sequence[dict[str, float]]) -> Table:
    """Return a table with a row per metric and a column per run; a dash marks a missing value."""
    table = Table(title="Comparison of edits, means over the training views", title_justify="left")
    table.add_column("metric")
    for title in titles:
        table.add_column(title, justify="right")
    for name in metric_names(metrics):
        values = [f"{run[name]:.{1 if 'psnr' in name else 3}f}" if name in run else "-" for run in metrics]
        table.add_row(name, *values)
    return table


def _draw_chart(titles: Sequence[str], metrics: Sequence[dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    names = metric_names(metrics)
    figure = Figure(figsize=(2.2 * len(names), 3), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        axes.bar(range(len(titles)), [run.get(name, 0.0) for run in metrics])
        axes.set_xticks(range(len(titles)), [title[0] for title in titles])
        axes.set_title(name, fontsize=7)
        axes.tick_params(labelsize=7)
    save_figure(file, figure, "metrics of edited scenes")
