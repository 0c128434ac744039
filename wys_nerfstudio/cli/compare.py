"""`wys compare`: the metrics of `ns-eval` and renders of finished runs on the same views, side by side.

Relevance fields are rendered from several sides (the paper's Fig. 15).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import track
from rich.table import Table
from torch import Tensor

from wys_nerfstudio.cli.finished_run import find_config, require_outside
from wys_nerfstudio.utils.atomic_io import write_json
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import (
    SHEET_SIDE,
    SHEET_VIEWS,
    SOFTWARE,
    contact_sheet,
    evenly_spaced,
    reduce,
    save_figure,
    save_png,
)

RENDERS = {"rgb": "render", "relevance": "relevance field", "relevance_overlay": "overlay"}
"""Model outputs in contact sheets, and their titles."""


@dataclass
class Compare:
    """Compare finished wys runs on the same views: a table of ns-eval's metrics, a contact sheet, a chart, and a sheet of
    each run's relevance field. Also accepts a single run."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders or config.yml files of the runs."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("wys-compare")
    """Folder of comparison.json, contact_sheet.png, chart.png and relevance_A.png, relevance_B.png, ..."""

    def main(self) -> None:
        """Compare the runs."""
        compare_runs(self.runs, self.output)


def compare_runs(runs: Sequence[Path], output: Path) -> None:
    """Print the runs' metrics and write `comparison.json`, `contact_sheet.png`, `chart.png` and `relevance_A.png` per run.

    Args:
        runs: Folders or config.yml files of finished wys runs on the same views.
        output: Output folder.

    Raises:
        WysError: If no run is given, a run is of another method, the runs' views differ, or a run would be changed.
    """
    from nerfstudio.utils.eval_utils import eval_setup
    from nerfstudio.utils.rich_utils import CONSOLE

    if not runs:
        raise WysError("wys compare takes one or more runs: wys compare RUN_A RUN_B.")
    configs = [find_config(run, "wys compare") for run in runs]
    for config in configs:
        require_outside(output, config)  # a run has a contact_sheet.png as well
    titles = [f"{chr(ord('A') + i)}: {config.parent.name}" for i, config in enumerate(configs)]
    names: list[str] = []
    shown_views: list[int] = []
    metrics: list[dict[str, float]] = []
    captured: list[Tensor] = []
    renders: list[list[dict[str, Tensor]]] = []
    for config in configs:
        pipeline: Any = eval_setup(config, test_mode="test")[1]
        data = pipeline.datamanager
        if not names:
            names = data.view_names
            shown_views = evenly_spaced(SHEET_VIEWS, len(names))
            captured = [reduce(data.captured_views([view])[0], SHEET_SIDE) for view in shown_views]
        elif data.view_names != names:
            raise WysError(
                f'"{config.parent}" and "{configs[0].parent}" have different views: compare runs on the same data.'
            )
        metrics.append(pipeline.get_average_eval_image_metrics()["edit"]["mean"])
        cameras, size, shown = data.train_dataset.cameras, tuple(captured[0].shape[:2]), []
        for view in track(shown_views, description="Contact sheet", console=CONSOLE):
            render = pipeline.scene_model.render_view(cameras, view, size)
            shown.append({name: render[name].clamp(0, 1).cpu() for name in RENDERS})
        renders.append(shown)

    output.mkdir(parents=True, exist_ok=True)
    folders = {title: str(config.parent) for title, config in zip(titles, configs)}
    write_json(output / "comparison.json", {"runs": folders, "metrics": dict(zip(titles, metrics))})
    shown_names = [names[view] for view in shown_views]
    rows = [(name, [captured[i], *(views[i]["rgb"] for views in renders)]) for i, name in enumerate(shown_names)]
    about = f"renders of scenes edited with {SOFTWARE}"
    save_png(output / "contact_sheet.png", contact_sheet(["captured", *titles], rows), about)
    for title, views in zip(titles, renders):
        rows = [(name, [captured[i], *views[i].values()]) for i, name in enumerate(shown_names)]
        save_png(output / f"relevance_{title[0]}.png", contact_sheet(["captured", *RENDERS.values()], rows), about)
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
