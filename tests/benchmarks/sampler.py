"""Samplers of edits: few second-order steps against many of DDIM, on toy pictures with known edits.

Each picture is edited from nearly pure noise inside the true mask of its edit. PSNR is measured inside the mask: to the true edit,
and to the converged edit, which the same editor makes in many DDIM steps. Strong guidance overshoots the embedded editor's edits, so
that weaker guidance is measured, too. Writes `sampler.json`.

    python tests/benchmarks/sampler.py
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro
from families import Picture, pictures

from wys_nerfstudio.editing import EMBEDDED, Editor, EditSettings, edit_images, load_editor
from wys_nerfstudio.evaluation.metrics import psnr

CASES = [(1, 20), (1, 10), (2, 10), (2, 8)]
"""Order and steps; the first is the sampler of Instruct-NeRF2NeRF."""


@dataclass
class Options:
    """Options of the benchmark."""

    editor: str = EMBEDDED
    """The editor."""
    pictures: int = 12
    """Number of pictures."""
    seeds: int = 3
    """Edits per picture, each with its own noise."""
    guidance: tuple[tuple[float, float], ...] = ((7.5, 1.5), (2.0, 1.5))
    """Pairs of S_T and S_I."""
    strength: float = 0.98
    """Noise that edits start from."""
    converged_steps: int = 100
    """DDIM steps of the converged edit."""
    output: Path = Path("sampler.json")
    """JSON file to write; the table is also printed as Markdown."""


def measure(
    editor: Editor, chosen: Sequence[Picture], guidance: tuple[float, float], options: Options
) -> list[dict[str, object]]:
    """Return a row per case, and one of the converged edit."""
    seeds = list(range(options.seeds))
    edits, rows = {}, []
    for case in [(1, options.converged_steps), *CASES]:
        order, steps = case
        settings = EditSettings(*guidance, steps, order)
        began, to_truth, to_converged = time.process_time(), [], []
        for number, picture in enumerate(chosen):
            images, masks = (x.expand(len(seeds), *x.shape) for x in (picture.image, picture.mask))
            noises = [1000 * number + seed for seed in seeds]
            result = edit_images(
                editor, images, images, masks, picture.instruction, settings, strength=options.strength, seeds=noises
            )
            converged = edits.setdefault(number, result)
            to_truth.append([psnr(edited, picture.edited, picture.mask) for edited in result])
            to_converged.append([psnr(*pair, picture.mask) for pair in zip(result, converged)])
        by_seed = [mean(values) for values in zip(*to_truth)]
        rows.append(
            {
                "S_T": guidance[0],
                "S_I": guidance[1],
                "order": order,
                "steps": steps,
                "to the truth, dB": mean(by_seed),
                "range over seeds": f"{min(by_seed):.2f} to {max(by_seed):.2f}",
                "to the converged edit, dB": mean(mean(values) for values in to_converged),
                "CPU seconds per edit": (time.process_time() - began) / len(chosen) / len(seeds),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(options: Options) -> None:
    """Measure, print the table and write the JSON file."""
    editor, chosen = load_editor(options.editor), list(pictures(options.pictures))
    rows = [row for guidance in options.guidance for row in measure(editor, chosen, guidance, options)]
    print(f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    options.output.write_text(json.dumps(rows, indent=1), "utf8")


if __name__ == "__main__":
    main(tyro.cli(Options))
