"""Accuracy of localization on ground truth, by input of the relevance head and normalization of the relevance maps.

For every edit of a toy scene, the relevance head is trained on the maps of the training views while the scene stays fixed. Its
renders of held-out views, without and with free-space relevance from the visual hull, and the relevance maps of those views are
compared with the true masks. Requires a scene written by `wys demo-scene` and a finished wys-tiny run on it:

    python tests/benchmarks/localization.py SCENE RUN --output localization.json
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.editing import EMBEDDED, Editor, load_editor, relevance_maps
from wys_nerfstudio.editing.sampling import edit_seed
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.metrics import average_precision, intersection_over_union
from wys_nerfstudio.field import RelevanceInput
from wys_nerfstudio.pipeline import WysPipeline
from wys_nerfstudio.training.base_run import load_base
from wys_nerfstudio.training.schedule import Phase

EDITS = ("panda", "polar-bear", "hat", "sunglasses", "ball-blue", "block-red")


@dataclass
class Options:
    """Options of the benchmark."""

    scene: tyro.conf.Positional[Path]
    """Scene with ground truth."""
    run: tyro.conf.Positional[Path]
    """Run or checkpoint of that scene."""
    editor: str = EMBEDDED
    """Editor: a hub id, a local folder or "embedded"."""
    num_samples: int = 4
    """Noise samples averaged per relevance map."""
    noise_level: float = 0.8
    """Noise level of relevance maps (t_rel), as a share of the diffusion."""
    outlier_factor: float = wys_tiny.config.pipeline.relevance_outlier_factor  # type: ignore
    """Relevance is clamped at Q3 + this many interquartile ranges."""
    expectile: float = wys_tiny.config.pipeline.model.relevance_expectile  # type: ignore
    """Expectile of the relevance loss: the share of views that must agree that a surface is relevant."""
    steps: int = wys_tiny.config.pipeline.localize_steps  # type: ignore
    """Training steps of the relevance head."""
    rays: int = wys_tiny.config.pipeline.datamanager.localize_rays  # type: ignore
    """Rays per step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of maps and heads."""
    edits: tuple[str, ...] = EDITS
    """Edits to measure, as named in the scene's ground truth."""
    inputs: tuple[RelevanceInput, ...] = get_args(RelevanceInput)
    """Inputs of the relevance head to measure."""
    normalizations: tuple[Literal["view", "scene"], ...] = ("view", "scene")
    """Normalizations of the relevance maps to measure: in each view, or over the scene."""
    output: Path = field(default_factory=lambda: Path("localization.json"))
    """JSON file to write; the table is also printed as Markdown."""


def build(options: Options, relevance_input: RelevanceInput, seed: int) -> WysPipeline:
    """Return a pipeline with the run's scene and a newly initialized relevance head."""
    config = copy.deepcopy(wys_tiny.config.pipeline)
    config.datamanager.data = options.scene
    config.editor = options.editor
    config.model.relevance_input = relevance_input
    config.model.relevance_expectile = options.expectile
    config.datamanager.localize_num_rays_per_batch = options.rays
    torch.manual_seed(seed)
    pipeline = config.setup(device="cpu", test_mode="val")
    load_base(pipeline.scene_model, options.run)
    return pipeline


def raw_maps(
    options: Options, editor: Editor, pipeline: WysPipeline, instruction: str, seed: int
) -> Float[Tensor, "n lh lw"]:
    """Return the maps of all training views, then of all held-out views, before normalization."""
    data = pipeline.datamanager
    held_out = [data.eval_dataset[i]["image"] for i in range(len(data.eval_dataset))]
    images = torch.cat([data.captured_views(range(data.num_views)), torch.stack(held_out)])
    seeds = [edit_seed(seed, -1 - i) for i in range(len(images))]
    parts = relevance_maps(
        editor, images, instruction, noise_level=options.noise_level, num_samples=options.num_samples, seeds=seeds
    )
    return torch.cat(list(parts))


def train_head(pipeline: WysPipeline, steps: int) -> None:
    """Train the relevance head as in the localize phase."""
    model = pipeline.scene_model
    model.phase = Phase.LOCALIZE
    model.train()
    pipeline.datamanager.use_localize_rays()
    optimizer = wys_tiny.config.optimizers["relevance"]["optimizer"].setup(model.field.relevance_parameters())
    for _ in range(steps):
        bundle, batch = pipeline.datamanager.next_train(0)
        assert isinstance(bundle, RayBundle)
        loss = model.get_loss_dict(model(bundle), batch, {})["relevance_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.phase = Phase.EDIT


@torch.no_grad()
def field_renders(pipeline: WysPipeline) -> Float[Tensor, "n h w"]:
    """Render the relevance of the held-out views."""
    pipeline.eval()
    cameras = pipeline.datamanager.eval_dataset.cameras
    renders = [
        pipeline.model.get_outputs_for_camera(cameras[i : i + 1])["relevance_value"] for i in range(len(cameras))
    ]
    return torch.stack(renders)[..., 0]


def metrics(maps: Float[Tensor, "n h w"], truth: GroundTruth, names: list[str]) -> dict[str, float]:
    """Return mean metrics of relevance against the true masks, over the views in which the edit is visible.

    Args:
        maps: Relevance of the views in [0, 1].
        truth: Ground truth of the edit.
        names: File names of the views.
    """
    masks = [truth.mask(name) for name in names]
    visible = [i for i, mask in enumerate(masks) if mask.any()]
    rows = {"AP": [average_precision(maps[i], masks[i]) for i in visible]}
    for tau in (0.25, 0.35, 0.5, 0.7):
        rows[f"IoU {tau}"] = [intersection_over_union(relevance.threshold(maps[i], tau), masks[i]) for i in visible]
    return {name: sum(values) / len(values) for name, values in rows.items()}


def main(options: Options) -> None:
    """Measure all combinations, write the JSON file and print the table."""
    editor = load_editor(options.editor)
    rows = []
    for seed in options.seeds:
        for variant in options.inputs:
            for slug in options.edits:
                pipeline = build(options, variant, seed)
                index = json.loads((options.scene / "ground_truth" / "edits.json").read_text("utf8"))
                instruction = next(edit["instruction"] for edit in index if edit["slug"] == slug)
                truth = GroundTruth.find(options.scene, instruction)
                assert truth is not None
                data = pipeline.datamanager
                names = [path.name for path in data.eval_dataset.image_filenames]
                raw = raw_maps(options, editor, pipeline, instruction, seed)
                for normalization in options.normalizations:
                    maps = relevance.normalize(raw, normalization, options.outlier_factor)
                    initial_head = copy.deepcopy(pipeline.scene_model.field.mlp_relevance.state_dict())
                    unclamped_maps = relevance.normalize(raw, normalization, outlier_factor=None)
                    data.set_relevance(maps[: data.num_views], unclamped_maps[: data.num_views])
                    train_head(pipeline, options.steps)
                    key = {"seed": seed, "edit": slug, "normalization": normalization}
                    rows.append({**key, "source": variant, **metrics(field_renders(pipeline), truth, names)})
                    pipeline.session.edit_loop.build_visual_hull()
                    rows.append(
                        {**key, "source": f"{variant} and hull", **metrics(field_renders(pipeline), truth, names)}
                    )
                    pipeline.scene_model.field.relevance_hull.reset()
                    pipeline.scene_model.field.mlp_relevance.load_state_dict(initial_head)
                    if variant == options.inputs[0]:
                        held_out = relevance.resize(maps[data.num_views :], *data.view_size)
                        rows.append({**key, "source": "maps", **metrics(held_out, truth, names)})
                print(rows[-1], flush=True)
                options.output.write_text(json.dumps(rows, indent=1), "utf8")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Return the means over edits and seeds as Markdown."""
    columns = [name for name in rows[0] if name not in ("seed", "edit", "normalization", "source")]
    lines = [f"| relevance | normalized over | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for source in dict.fromkeys(row["source"] for row in rows):
        for normalization in dict.fromkeys(row["normalization"] for row in rows):
            chosen = [r for r in rows if r["source"] == source and r["normalization"] == normalization]
            means = [sum(r[c] for r in chosen) / len(chosen) for c in columns]
            lines.append(f"| {source} | {normalization} | {' | '.join(f'{m:.3f}' for m in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
