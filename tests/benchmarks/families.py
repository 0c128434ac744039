"""Relevance maps of editors of each parametrization (eps, v, flow matching) on the same pictures, against their true masks.

The embedded editor predicts v. The same networks are presented as editors that predict noise and that are flow-matching models, so
that these differ in the arithmetic alone; further editors are measured beside them. Two maps are compared:

- A, this package's: the difference that the instruction makes to the prediction, |eps(x, I, T) - eps(x, I, "")|.
- B, of one pass: the distance of the predicted clean latents from the picture's own, |x0(x, I, T) - z0|. It would suit distilled
  models, which are not trained on the empty instruction, but also shows what an editor changes without being told to.

    python tests/benchmarks/families.py --editors embedded-flow
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "editing"))
from eps_editor import eps_editor
from flow_editor import FlowEditor

from wys_nerfstudio import relevance
from wys_nerfstudio.demo.images import LOCAL, held_out_views
from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.editing import EMBEDDED, Editor, load_editor
from wys_nerfstudio.editing.edit import WITH_AND_WITHOUT_TEXT, latent_size
from wys_nerfstudio.editing.editor import resize_images
from wys_nerfstudio.editing.sampling import add_noise, seeded_noise
from wys_nerfstudio.evaluation.metrics import average_precision, intersection_over_union


@dataclass
class Options:
    """Options of the benchmark."""

    editors: tuple[str, ...] = ()
    """Further editors, beside the embedded one in its three parametrizations."""
    pictures: int = 60
    """Number of pictures."""
    levels: tuple[float, ...] = (0.5, 0.8, 0.95)
    """Noise levels of the maps (t_rel)."""
    num_samples: int = 4
    """Noise samples averaged per map."""
    threshold: float = 0.35
    """Pixels of at least this relevance are in the mask."""
    output: Path = Path("families.json")
    """JSON file to write; the table is also printed as Markdown."""


@dataclass
class Picture:
    """A toy picture, an instruction and what it changes."""

    image: Float[Tensor, "h w 3"]
    """The picture in [0, 1]."""
    instruction: str
    """What to change."""
    mask: Bool[Tensor, "h w"]
    """Pixels that the edit changes."""
    edited: Float[Tensor, "h w 3"]
    """The picture after the edit."""


def pictures(count: int) -> Iterator[Picture]:
    """Yield held-out toy pictures, each with one of the local edits."""
    for number, view in zip(range(count), held_out_views(LOCAL)):
        edit = LOCAL[number % len(LOCAL)]
        before, after = (view[number].float() / 255 for number in (-1, edit))
        yield Picture(before, EDITS[edit].wordings[0], (before != after).any(-1), after)


@torch.no_grad()
def raw_maps(
    editor: Editor, picture: Picture, strength: float, num_samples: int, seed: int
) -> dict[str, Float[Tensor, "n lh lw"]]:
    """Return maps A and B of a picture, one per noise sample.

    Args:
        editor: The editor.
        picture: The picture.
        strength: Noise level (t_rel).
        num_samples: Number of noise samples.
        seed: Seed of the noise.
    """
    size = editor.editing_size(*picture.mask.shape, None)
    encoding = editor.encode(resize_images(picture.image[None], *size))
    clean = encoding.latents
    level = editor.noise_level(strength, latent_size(clean))
    predict = editor.predictor(encoding.condition, picture.instruction, WITH_AND_WITHOUT_TEXT)
    maps: dict[str, list[Tensor]] = {"A": [], "B": []}
    for noise in seeded_noise([seed], (num_samples, *clean.shape[1:]), editor.device)[0]:
        noisy = add_noise(clean, noise[None], level)
        (edited, with_text), (_, without_text) = (editor.split(p, noisy, level) for p in predict(noisy, level))
        maps["A"].append(relevance.noise_difference(with_text, without_text))
        maps["B"].append(relevance.noise_difference(edited, clean))
    return {name: torch.cat(of_samples) for name, of_samples in maps.items()}


def measure(
    editor: Editor, strength: float, chosen: Sequence[Picture], options: Options
) -> dict[str, dict[str, float]]:
    """Return mean average precision and IoU over the pictures, for maps A and B."""
    rows: dict[str, list[tuple[float, float, float]]] = {"A": [], "B": []}
    for number, picture in enumerate(chosen):
        mask = picture.mask
        for name, raw in raw_maps(editor, picture, strength, options.num_samples, seed=number).items():
            single, mean = relevance.resize(torch.stack([raw[0], raw.mean(0)]), *mask.shape)
            normalized = relevance.upsample(raw.mean(0)[None], *mask.shape, outlier_factor=1000.0)[0]
            masked = relevance.threshold(normalized, options.threshold)
            precisions = average_precision(single, mask), average_precision(mean, mask)
            rows[name].append((*precisions, intersection_over_union(masked, mask)))
    columns = ("AP N=1", f"AP N={options.num_samples}", f"IoU at {options.threshold:g}")
    return {
        name: dict(zip(columns, (sum(values) / len(values) for values in zip(*of_pictures))))
        for name, of_pictures in rows.items()
    }


def main(options: Options) -> None:
    """Measure all editors, write the JSON file and print the table."""
    embedded: Callable[[], Editor] = lambda: load_editor(EMBEDDED)  # noqa: E731
    editors: dict[str, Callable[[], Editor]] = {
        "embedded, v": embedded,
        "embedded as eps": lambda: eps_editor(torch.float32),
        "embedded as flow matching": lambda: FlowEditor(embedded()),  # type: ignore
        **{name: lambda name=name: load_editor(name) for name in options.editors},
    }
    rows, chosen = [], list(pictures(options.pictures))
    for name, build in editors.items():
        editor = build()
        for strength in options.levels:
            for kind, values in measure(editor, strength, chosen, options).items():
                rows.append({"editor": name, "level": strength, "map": kind, **values})
                print(rows[-1], flush=True)
        options.output.write_text(json.dumps(rows, indent=1), "utf8")
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()) + " |")


if __name__ == "__main__":
    main(tyro.cli(Options))
