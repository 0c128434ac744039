"""Which input of the relevance head, and which normalisation of the maps, locates edits better on ground truth.

For every edit of a toy scene, maps of the training views are made once per normalisation, the relevance head is trained on
them on a fixed scene, and its renders are compared with the true masks on views that were held out from training, without
and with the hull that holds what is relevant in mid-air; so are the maps of those same views. Run it on a scene that
`wys demo-scene` wrote and a finished wys-tiny run on it:

    python tests/benchmarks/localization.py SCENE RUN --output localization.json
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from nerfstudio.cameras.rays import RayBundle

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
    """Run or checkpoint whose scene is used."""
    editor: str = EMBEDDED
    """Editor that is asked."""
    num_samples: int = 4
    """Noise samples averaged per relevance map."""
    noise_level: float = 0.8
    """t_rel."""
    outlier_factor: float = wys_tiny.config.pipeline.relevance_outlier_factor  # type: ignore
    """Maps are clamped at Q3 + this many interquartile ranges."""
    expectile: float = wys_tiny.config.pipeline.model.relevance_expectile  # type: ignore
    """Expectile of the relevance loss: the share of views that must agree that a surface is relevant."""
    steps: int = wys_tiny.config.pipeline.localize_steps  # type: ignore
    """Training steps of the relevance head."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of maps and heads."""
    edits: tuple[str, ...] = EDITS
    """Slugs of the edits."""
    inputs: tuple[RelevanceInput, ...] = get_args(RelevanceInput)
    """What relevance heads see."""
    normalizations: tuple[Literal["view", "scene"], ...] = ("view", "scene")
    """Over what maps are normalised."""
    output: Path = field(default_factory=lambda: Path("localization.json"))
    """JSON to write; a Markdown table goes to the terminal."""


def build(options: Options, relevance_input: RelevanceInput, seed: int) -> WysPipeline:
    """A pipeline on the scene with a fresh relevance head."""
    config = copy.deepcopy(wys_tiny.config.pipeline)
    config.datamanager.data = options.scene
    config.editor = options.editor
    config.model.relevance_input = relevance_input
    config.model.relevance_expectile = options.expectile
    torch.manual_seed(seed)
    pipeline = config.setup(device="cpu", test_mode="val")
    load_base(pipeline.scene_model, options.run)
    return pipeline


def raw_maps(options: Options, editor: Editor, pipeline: WysPipeline, instruction: str, seed: int) -> torch.Tensor:
    """Raw maps of training views, then of held-out views."""
    data = pipeline.datamanager
    held_out = [data.eval_dataset[i]["image"] for i in range(len(data.eval_dataset))]
    images = torch.cat([data.captured_views(range(data.num_views)), torch.stack(held_out)])
    seeds = [edit_seed(seed, -1 - i) for i in range(len(images))]
    parts = relevance_maps(
        editor, images, instruction, noise_level=options.noise_level, num_samples=options.num_samples, seeds=seeds
    )
    return torch.cat(list(parts))


def train_head(pipeline: WysPipeline, steps: int) -> None:
    """Trains the relevance head as the localise phase does."""
    model = pipeline.scene_model
    model.phase = Phase.LOCALIZE
    model.train()
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
def field_renders(pipeline: WysPipeline) -> torch.Tensor:
    """Rendered relevance of the held-out views."""
    pipeline.eval()
    cameras = pipeline.datamanager.eval_dataset.cameras
    renders = [
        pipeline.model.get_outputs_for_camera(cameras[i : i + 1])["relevance_value"] for i in range(len(cameras))
    ]
    return torch.stack(renders)[..., 0]


def figures(maps: torch.Tensor, truth: GroundTruth, names: list[str]) -> dict[str, float]:
    """Mean figures of maps against true masks, over the views in which something changes."""
    masks = [truth.mask(name) for name in names]
    seen = [i for i, mask in enumerate(masks) if mask.any()]
    rows = {"AP": [average_precision(maps[i], masks[i]) for i in seen]}
    for tau in (0.25, 0.35, 0.5, 0.7):
        rows[f"IoU {tau}"] = [intersection_over_union(relevance.threshold(maps[i], tau), masks[i]) for i in seen]
    return {name: sum(values) / len(values) for name, values in rows.items()}


def main(options: Options) -> None:
    """Runs all combinations and writes the table."""
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
                    maps = relevance.resize(
                        relevance.normalize(raw, normalization, options.outlier_factor), *data.view_size
                    )
                    start = copy.deepcopy(pipeline.scene_model.field.mlp_relevance.state_dict())
                    unclamped_maps = relevance.normalize(raw, normalization, outlier_factor=None)
                    data.set_relevance(maps[: data.num_views], unclamped_maps[: data.num_views])
                    train_head(pipeline, options.steps)
                    key = {"seed": seed, "edit": slug, "normalization": normalization}
                    rows.append({**key, "source": variant, **figures(field_renders(pipeline), truth, names)})
                    pipeline.session.edit_loop.build_visual_hull()
                    rows.append(
                        {**key, "source": f"{variant} and hull", **figures(field_renders(pipeline), truth, names)}
                    )
                    pipeline.scene_model.field.relevance_hull.reset()
                    pipeline.scene_model.field.mlp_relevance.load_state_dict(start)
                    if variant == options.inputs[0]:
                        rows.append({**key, "source": "maps", **figures(maps[data.num_views :], truth, names)})
                print(rows[-1], flush=True)
                options.output.write_text(json.dumps(rows, indent=1), "utf8")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Means over edits and seeds as Markdown."""
    columns = [name for name in rows[0] if name not in ("seed", "edit", "normalization", "source")]
    lines = [f"| relevance | normalised over | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for source in dict.fromkeys(row["source"] for row in rows):
        for normalization in dict.fromkeys(row["normalization"] for row in rows):
            chosen = [r for r in rows if r["source"] == source and r["normalization"] == normalization]
            means = [sum(r[c] for r in chosen) / len(chosen) for c in columns]
            lines.append(f"| {source} | {normalization} | {' | '.join(f'{m:.3f}' for m in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
