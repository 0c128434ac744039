"""Average precision of relevance maps during training, and its curve."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wys_nerfstudio import relevance
from wys_nerfstudio.demo.instructions import BY_SLUG, EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.training.editor_data import INDEX
from wys_nerfstudio.evaluation import metrics


def _mean_precision(maps: Tensor, masks: Tensor) -> float:
    return float(np.mean([metrics.average_precision(m, t) for m, t in zip(maps, masks) if t.any()]))


def measure_maps(
    predict: Callable[[int], Float[Tensor, "draws b c lh lw"]], changed: Bool[Tensor, "b edits h w"]
) -> dict[str, float]:
    """Compute the average precision of raw relevance maps of all local edits.

    Args:
        predict: Returns the predictions for the edit of an index; len(EDITS) is the empty instruction.
        changed: Pixels that each edit changes.

    Returns:
        Mean average precision by edit, overall and of single draws, and the wrong-object ratio.
    """
    empty, result, ratios = predict(len(EDITS)), {}, []
    objects = {name: changed[:, INDEX[slug]] for name, slug in (("ball", "ball-red"), ("block", "block-red"))}
    objects["bear"] = changed[:, INDEX["panda"]] | changed[:, INDEX["polar-bear"]]
    single = []
    for edit in EDITS:
        if edit.kind not in LOCAL_KINDS:
            continue
        draws = (predict(INDEX[edit.slug]) - empty).abs().mean(2)
        masks = changed[:, INDEX[edit.slug]]
        maps = relevance.resize(draws.mean(0), *changed.shape[2:])
        result[f"AP {edit.slug} N={len(draws)}"] = _mean_precision(maps, masks)
        single.append(_mean_precision(relevance.resize(draws[0], *changed.shape[2:]), masks))
        named = edit.target if edit.target in objects else "bear"
        for m, t, *others in zip(maps, masks, *(v for k, v in objects.items() if k != named)):
            elsewhere = torch.stack(others).any(0) & ~t
            if t.any() and elsewhere.any():
                ratios.append((m[t].mean() / m[elsewhere].mean()).item())
    result[f"AP N={len(empty)}"] = float(np.mean([result[key] for key in result]))
    result["AP N=1"] = float(np.mean(single))
    result["wrong-object ratio (median)"] = float(np.median(ratios))
    return result


def draw_curve(log: list[dict], file: Path, *, draws: int) -> None:
    """Plot average precision over the number of training samples.

    Args:
        log: Entries of the training log.
        file: Output file.
        draws: Number of noise samples of the maps.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    samples = [line["samples"] for line in log]
    for kind, slugs in {
        "recolor ball": [s for s in BY_SLUG if s.startswith("ball")],
        "recolor block": [s for s in BY_SLUG if s.startswith("block")],
        "turn into": ["panda", "polar-bear"],
        "hat": ["hat"],
        "sunglasses": ["sunglasses"],
    }.items():
        axes.plot(samples, [np.mean([line[f"AP {slug} N={draws}"] for slug in slugs]) for line in log], label=kind)
    axes.set(xlabel="samples", ylabel="average precision, validation", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
