"""`wys compare`: finished runs on the same views beside each other, as a table, a contact sheet and a chart, and of each run
its relevance field from several sides (the paper's Fig. 15).

The figures are those of `ns-eval`. As there, a run's config.yml is opened by nerfstudio and must be one that you trust.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from torch import Tensor

from wys_nerfstudio.utils.atomic_io import write_json
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.visualization import contact_sheet, evenly_spaced

SHOWN_VIEWS = 6
RENDERS = {"rgb": "render", "relevance": "relevance field", "relevance_overlay": "overlay"}
"""Outputs of the model that are shown, and their titles."""


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
        compare_runs(self.runs, self.output)


def find_config(run: Path) -> Path:
    """The config.yml of a run, given as the folder or the file itself.

    Raises:
        WysError: If there is none.
    """
    config = run / "config.yml" if run.is_dir() else run
    if config.name != "config.yml" or not config.is_file():
        raise WysError(
            f'There is no config.yml in "{run}": wys compare takes folders of finished wys runs, such as '
            "outputs/scene/wys/2025-01-01_120000."
        )
    return config


def compare_runs(runs: Sequence[Path], output: Path) -> None:
    """Prints a table of the runs' figures and leaves `comparison.json`, `contact_sheet.png`, `chart.png` and a
    `relevance_A.png` per run.

    Args:
        runs: Folders or config.yml files of finished wys runs on the same views.
        output: Folder for the files.

    Raises:
        WysError: If there is no run, one is none of this method, or their views differ.
    """
    from nerfstudio.utils.eval_utils import eval_setup
    from nerfstudio.utils.rich_utils import CONSOLE

    from wys_nerfstudio.pipeline import WysPipeline

    if not runs:
        raise WysError("wys compare takes one run or several: wys compare RUN_A RUN_B.")
    configs = [find_config(run) for run in runs]
    titles = [f"{chr(ord('A') + i)}: {config.parent.name}" for i, config in enumerate(configs)]
    names: list[str] = []
    figures: list[dict[str, float]] = []
    captured: list[Tensor] = []
    renders: list[list[dict[str, Tensor]]] = []
    for config in configs:
        pipeline: Any = eval_setup(config, test_mode="test")[1]
        if not isinstance(pipeline, WysPipeline):
            raise WysError(f'"{config.parent}" is no wys run: wys compare takes runs of ns-train wys or wys-tiny.')
        data = pipeline.datamanager
        if not names:
            names = data.view_names
            captured = [data.captured_views([view])[0] for view in evenly_spaced(SHOWN_VIEWS, len(names))]
        elif data.view_names != names:
            raise WysError(
                f'"{config.parent}" has other views than "{configs[0].parent}": compare runs on the same data.'
            )
        figures.append(pipeline.get_average_eval_image_metrics()["edit"]["mean"])
        cameras = data.train_dataset.cameras
        shown = [pipeline.scene_model.render_view(cameras, view) for view in evenly_spaced(SHOWN_VIEWS, len(names))]
        renders.append([{name: view[name].clamp(0, 1).cpu() for name in RENDERS} for view in shown])

    output.mkdir(parents=True, exist_ok=True)
    runs_as_said = {title: str(config.parent) for title, config in zip(titles, configs)}
    write_json(output / "comparison.json", {"runs": runs_as_said, "figures": dict(zip(titles, figures))})
    shown_names = [names[view] for view in evenly_spaced(SHOWN_VIEWS, len(names))]
    rows = [(name, [captured[i], *(views[i]["rgb"] for views in renders)]) for i, name in enumerate(shown_names)]
    contact_sheet(["captured", *titles], rows).save(output / "contact_sheet.png")
    for title, views in zip(titles, renders):
        rows = [(name, [captured[i], *views[i].values()]) for i, name in enumerate(shown_names)]
        contact_sheet(["captured", *RENDERS.values()], rows).save(output / f"relevance_{title[0]}.png")
    _chart(titles, figures, output / "chart.png")
    CONSOLE.print(table(titles, figures))
    CONSOLE.print(f"See contact_sheet.png, chart.png and relevance_*.png in {output}.", markup=False)


def measures(figures: Sequence[dict[str, float]]) -> list[str]:
    """Every measure that any run has, in the order in which they come."""
    return list(dict.fromkeys(name for of_run in figures for name in of_run))


def table(titles: Sequence[str], figures: Sequence[dict[str, float]]) -> Table:
    """One row per measure, one column per run; a dash where a run has no such figure."""
    result = Table(title="Edits compared, means over the training views", title_justify="left")
    result.add_column("measure")
    for title in titles:
        result.add_column(title, justify="right")
    for name in measures(figures):
        values = [f"{of_run[name]:.{1 if 'psnr' in name else 3}f}" if name in of_run else "-" for of_run in figures]
        result.add_row(name, *values)
    return result


def _chart(titles: Sequence[str], figures: Sequence[dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    names = measures(figures)
    figure = Figure(figsize=(2.2 * len(names), 3), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        axes.bar(range(len(titles)), [of_run.get(name, 0.0) for of_run in figures])
        axes.set_xticks(range(len(titles)), [title[0] for title in titles])
        axes.set_title(name, fontsize=7)
        axes.tick_params(labelsize=7)
    figure.savefig(file, dpi=120)
