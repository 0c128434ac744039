"""Operations and memory of relevance maps, edits and whole scene edits with the public editors in their full sizes.

The package's own `relevance_maps` and `edit_images` run on torch's meta device, so that no weights and no GPU are needed. What is
counted is what runs: every branch, encoding and decoding. Operations are those of matrix products, convolutions and attention, two
per multiplication with addition. Memory is that of the weights, in each editor's half precision, and of all tensors that exist at
the same time; the CUDA context, workspaces of cuDNN and fragmentation come on top. Writes the page's tables, `flops.json`,
`flops-edit.json` and `flops-memory.json`.

    python tests/benchmarks/flops.py --output DIR
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import architectures
import torch
import tyro
from meta_device import Cost, count, on_meta_device
from speed import SLOW_STEPS

from wys_nerfstudio.config import wys
from wys_nerfstudio.editing import (
    EditOptions,
    EditSettings,
    edit_images,
    flux2,
    qwen,
    relevance_maps,
    sdxl,
    stable_diffusion,
)
from wys_nerfstudio.editing.flux2 import Flux2Editor
from wys_nerfstudio.editing.qwen import QwenEditor
from wys_nerfstudio.editing.sdxl import SdxlEditor
from wys_nerfstudio.editing.stable_diffusion import StableDiffusionEditor
from wys_nerfstudio.training.schedule import strength_of_edit

INSTRUCTION = "turn the bear into a panda"

AnyEditor = StableDiffusionEditor | Flux2Editor | QwenEditor

QWEN_TEMPLATE_TOKENS = 64
"""First tokens of Qwen-Image-Edit's prompt, whose states diffusers leaves out (`prompt_template_encode_start_idx`)."""
QWEN_TEXT_TOKENS = 24
"""Its further tokens, beside the image's, with a short instruction."""


@dataclass
class Options:
    """Options of the benchmark."""

    output: Path
    """Folder for the tables."""
    sides: tuple[int, ...] = (512, 1024)
    """Sides of the square images, in pixels."""
    views: int = 100
    """Views of the scene, of which each has a relevance map."""
    edits: int = 400
    """Edits of the scene."""
    batch: int = 8
    """Views per batch of relevance maps; affects memory only."""


@dataclass
class Row:
    """Costs of one editor at one image size. Memory includes weights."""

    editor: str
    """Name of the editor."""
    side: int
    """Side of the image in pixels."""
    map_tflop: float
    """TFLOP of a relevance map."""
    step_tflop: float
    """TFLOP of a denoising step."""
    edit_tflop: float
    """TFLOP of an edit of an image, from pure noise."""
    edit_steps: int
    """Its steps, the editor's default."""
    scene_edit_tflop: float
    """Mean TFLOP of an edit of a scene, whose captured view has been encoded before."""
    scene_edit_steps: float
    """Its mean steps."""
    scene_pflop: float
    """PFLOP of all maps, encodings of captured views, and edits of a scene."""
    map_gb: float
    """Peak memory of a relevance map, in GB."""
    maps_gb: float
    """Peak memory of a batch of relevance maps, in GB."""
    edit_gb: float
    """Peak memory of an edit, in GB."""


@dataclass
class EditParts:
    """Operations of the parts of an edit."""

    encoding: int
    """Encoding of one image."""
    step: int
    """Denoising step."""
    text: int
    """States of the texts, where they depend on the image."""
    decoding: int
    """Decoding of the result."""

    def edit(self, steps: float, encodings: int) -> float:
        """Operations of an edit.

        Args:
            steps: Denoising steps.
            encodings: Images that are encoded.
        """
        return encodings * self.encoding + steps * self.step + self.text + self.decoding


@dataclass
class Weights:
    """Networks of one editor."""

    editor: str
    """Name of the editor."""
    parameters: dict[str, int]
    """Number of parameters by network."""
    gb: float
    """GB of all weights in half precision."""
    resident_gb: float
    """GB of the weights that are on the device during maps and edits."""
    text_tflop: float
    """TFLOP of the states of an instruction and of the empty instruction, computed once in a run; of Qwen-Image-Edit, whose text
    encoder sees the image, in every map and edit."""


# ----------------------------------------------------------------------------------------------------------------- editors


class FullLengthTokenizer:
    """Stands in for a tokenizer: every text has the largest number of tokens, as after padding."""

    unk_token_id = pad_token_id = None
    all_special_ids = ()

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        """The text of the only message."""
        return messages[0]["content"]

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        """Tokens of one text and their causal mask, which transformers takes without looking at its values."""
        length = self.model_max_length
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        return SimpleNamespace(input_ids=torch.ones(1, length, dtype=torch.long), attention_mask=mask)


class ShortTextProcessor:
    """Stands in for Qwen-Image-Edit's processor: images are prepared as by its own, and every text is equally long."""

    def __init__(self) -> None:
        from transformers import Qwen2VLImageProcessor

        self.tokenizer = FullLengthTokenizer(QWEN_TEXT_TOKENS)
        self.image_processor = Qwen2VLImageProcessor()

    def __call__(self, text: list[str], images: list[Any], **arguments: Any) -> dict[str, torch.Tensor]:
        """Tokens of texts with one image each, and the images' patches."""
        inputs = self.image_processor(images=images, **arguments)
        tokens = (
            QWEN_TEMPLATE_TOKENS
            + QWEN_TEXT_TOKENS
            + int(inputs["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2
        )
        return {"input_ids": torch.ones(len(text), tokens, dtype=torch.long), **inputs}


def build_editors() -> "list[AnyEditor]":
    """All editors on the meta device, in their half precision; each with `architectures`' networks."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    diffusion: dict[str, Any] = {
        "tokenizer": FullLengthTokenizer(77),
        "alphas_cumprod": schedule.alphas_cumprod,
        "final_alpha": torch.tensor(1.0),
        "prediction_type": "epsilon",
    }
    with torch.device("meta"):
        networks = [
            architectures.stable_diffusion(),
            architectures.sdxl(),
            architectures.flux2_klein(),
            architectures.qwen_image_edit(),
        ]
    profiles = [stable_diffusion.profile({}), sdxl.profile({}), flux2.profile({}), qwen.profile({})]
    for parts, profile in zip(networks, profiles):
        for network in parts.values():
            torch.nn.Module.to(network, getattr(torch, profile.half_precision))  # diffusers' own `to` warns
            network.eval().requires_grad_(False)
        parts["vae"].enable_slicing()
    networks[1]["vae"].float()  # as the loader: SDXL's own VAE overflows in half precision
    second = {"tokenizer_2": FullLengthTokenizer(77), "empty_text_is_zero": True}
    flow = {
        "tokenizer": FullLengthTokenizer(flux2.MAX_TOKENS),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    }
    qwen_scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    of_qwen: dict[str, Any] = {
        "scheduler": qwen_scheduler,
        "processor": ShortTextProcessor(),
        "template": "{}",
        "template_tokens": QWEN_TEMPLATE_TOKENS,
    }
    return [
        StableDiffusionEditor("InstructPix2Pix", **networks[0], **diffusion),
        SdxlEditor("SDXL InstructPix2Pix", **networks[1], **diffusion, **second),
        Flux2Editor("FLUX.2-klein-base-4B", profiles[2], **networks[2], **flow),
        Flux2Editor("FLUX.2-klein-4B", flux2.profile({"is_distilled": True}), **networks[2], **flow),
        QwenEditor("Qwen-Image-Edit", profiles[3], **networks[3], **of_qwen),
    ]


def networks_of(editor: AnyEditor) -> dict[str, torch.nn.Module]:
    """All networks of an editor by name."""
    return {name: part for name, part in vars(editor).items() if isinstance(part, torch.nn.Module)}


def resident(editor: AnyEditor) -> list[torch.nn.Module]:
    """The networks that are on the device during maps and edits: klein's text encoder is not."""
    parts = networks_of(editor)
    if isinstance(editor, Flux2Editor):
        del parts["text_encoder"]
    return list(parts.values())


# ------------------------------------------------------------------------------------------------------------------- costs


def weights_of(editor: AnyEditor) -> Weights:
    """Count the weights of an editor, and what its text states take, which the editor keeps."""

    def gb(networks: Sequence[torch.nn.Module]) -> float:
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters()) / 1e9

    parts = networks_of(editor)
    text = count(lambda: [editor.encode_text(text) for text in (INSTRUCTION, "")], list(parts.values()))
    return Weights(
        editor=editor.name,
        parameters={name: sum(p.numel() for p in network.parameters()) for name, network in parts.items()},
        gb=gb(list(parts.values())),
        resident_gb=gb(resident(editor)),
        text_tflop=text.flop / 1e12,
    )


def cost_in_run(editor: AnyEditor, work: Callable[[], object]) -> Cost:
    """Count a piece of work in a run that has encoded its texts before."""
    for text in (INSTRUCTION, ""):
        editor.encode_text(text)
    return count(work, resident(editor))


def edit_cost(editor: AnyEditor, side: int, settings: EditSettings) -> Cost:
    """Count one edit of a square image from pure noise.

    Args:
        editor: The editor.
        side: Of the image, in pixels.
        settings: Guidance and steps.
    """
    image = torch.empty(1, side, side, 3, device="meta")
    mask = torch.empty(1, side, side, dtype=torch.bool, device="meta")
    settings = replace(settings, resolution=side)

    def edit() -> object:
        return edit_images(editor, image, image, mask, INSTRUCTION, settings, strength=1.0, seeds=[0])

    return cost_in_run(editor, edit)


def parts_of_edit(editor: AnyEditor, side: int, settings: EditSettings) -> EditParts:
    """Count the parts of an edit; arguments as in `edit_cost`. Every step is the same work."""
    image = torch.empty(1, side, side, 3, device="meta")
    latents = editor.encode(image).latents
    encoding, decoding = (
        count(work, []).flop for work in (lambda: editor.encode(image), lambda: editor.decode(latents))
    )
    two, three = (edit_cost(editor, side, replace(settings, diffusion_steps=steps)).flop for steps in (2, 3))
    step = three - two
    return EditParts(encoding, step, two - 2 * encoding - 2 * step - decoding, decoding)


def map_cost(editor: AnyEditor, side: int, settings: EditSettings, batch: int) -> Cost:
    """Count relevance maps of a batch of square images; arguments as in `edit_cost`."""
    images = torch.empty(batch, side, side, 3, device="meta")
    level, seeds = settings.relevance_noise_level, list(range(batch))
    maps = relevance_maps(
        editor, images, INSTRUCTION, noise_level=level, seeds=seeds, resolution=side, batch_size=batch
    )
    return cost_in_run(editor, lambda: next(maps))


def strengths_of_edits(edits: int) -> list[float]:
    """Noise that the first edits of a run of `wys` start from."""
    config: Any = wys.config.pipeline
    return [strength_of_edit(config.seed, i, config.min_strength, config.max_strength) for i in range(edits)]


def steps_of_edits(editor: AnyEditor, side: int, diffusion_steps: int, edits: int) -> list[int]:
    """Denoising steps of the first edits of a run of `wys`."""
    size = editor.latent_size(side, side)
    return [len(editor.noise_levels(strength, diffusion_steps, size)) - 1 for strength in strengths_of_edits(edits)]


def row_of(editor: AnyEditor, side: int, options: Options) -> Row:
    """Count the maps and edits of an editor at an image size."""
    of_image, of_scene = (EditOptions().resolve(of) for of in (editor.profile.of_images, editor.profile.of_scenes))
    one_map, maps = (map_cost(editor, side, of_scene, batch) for batch in (1, options.batch))
    parts = parts_of_edit(editor, side, of_scene)
    steps = mean(steps_of_edits(editor, side, of_scene.diffusion_steps, options.edits))
    scene_edit = parts.edit(steps, encodings=1)
    return Row(
        editor=editor.name,
        side=side,
        map_tflop=one_map.flop / 1e12,
        step_tflop=parts.step / 1e12,
        edit_tflop=parts.edit(of_image.diffusion_steps, encodings=2) / 1e12,
        edit_steps=of_image.diffusion_steps,
        scene_edit_tflop=scene_edit / 1e12,
        scene_edit_steps=steps,
        scene_pflop=(options.views * (one_map.flop + parts.encoding) + options.edits * scene_edit) / 1e15,
        map_gb=one_map.peak_bytes / 1e9,
        maps_gb=maps.peak_bytes / 1e9,
        edit_gb=edit_cost(editor, side, replace(of_scene, diffusion_steps=3)).peak_bytes / 1e9,
    )


def operations_table(rows: Sequence[Row]) -> list[list[str]]:
    """Columns and rows of the page's table of operations."""
    first = rows[0].scene_pflop
    columns = [
        "editor",
        "side, px",
        "relevance map, TFLOP",
        "denoising step, TFLOP",
        "edit of an image, TFLOP (steps)",
        "mean edit of a scene, TFLOP (steps)",
        "maps and edits of a scene, PFLOP",
        f"relative to {rows[0].editor} at {rows[0].side}",
    ]
    return [
        columns,
        *(
            [
                row.editor,
                str(row.side),
                rounded(row.map_tflop),
                rounded(row.step_tflop),
                f"{rounded(row.edit_tflop)} ({row.edit_steps})",
                f"{rounded(row.scene_edit_tflop)} ({row.scene_edit_steps:.1f})",
                rounded(row.scene_pflop),
                f"{row.scene_pflop / first:.1f}",
            ]
            for row in rows
        ),
    ]


def memory_table(weights: Sequence[Weights], rows: Sequence[Row], batch: int) -> list[list[str]]:
    """Columns and rows of the page's table of memory."""
    sides = sorted({row.side for row in rows})
    columns = ["editor", "parameters, billion", "all weights, GB", "weights on the device, GB", "texts, TFLOP"]
    for side in sides:
        columns += [f"edit at {side}, GB", f"map at {side}, GB", f"{batch} maps at {side}, GB"]
    table = [columns]
    for w in weights:
        figures = [sum(w.parameters.values()) / 1e9, w.gb, w.resident_gb, w.text_tflop]
        cells = [w.editor, f"{figures[0]:.2f}", *(f"{figure:.1f}" for figure in figures[1:])]
        for row in (row for side in sides for row in rows if (row.editor, row.side) == (w.editor, side)):
            cells += [f"{gb:.1f}" for gb in (row.edit_gb, row.map_gb, row.maps_gb)]
        table.append(cells)
    return table


def rounded(value: float) -> str:
    """Three digits, or all before the decimal point."""
    return f"{value:,.{max(0, 2 - int(math.log10(value))) if value >= 1 else 2}f}"


def parts_table(editor: AnyEditor, side: int, edits: int) -> list[list[str]]:
    """Columns and rows of the page's table of the parts of an edit, beside those of Instruct-NeRF2NeRF's way."""
    settings = EditOptions().resolve(editor.profile.of_scenes)
    parts = parts_of_edit(editor, side, settings)
    of_ddim, of_wys = (steps_of_edits(editor, side, steps, edits) for steps in (SLOW_STEPS, settings.diffusion_steps))
    ways = {  # mean steps, encodings
        "Instruct-NeRF2NeRF's way": (SLOW_STEPS, 2),
        "`wys` with 20 steps of DDIM": (mean(of_ddim), 1),
        "`wys`": (mean(of_wys), 1),
    }
    total = [parts.edit(*way) for way in ways.values()]
    return [
        ["TFLOP of the mean edit", *ways],
        [
            "denoising (mean steps)",
            *(f"{rounded(steps * parts.step / 1e12)} ({steps:.1f})" for steps, _ in ways.values()),
        ],
        [
            "encoding of render and captured view",
            *(rounded(encodings * parts.encoding / 1e12) for _, encodings in ways.values()),
        ],
        ["decoding", *[rounded(parts.decoding / 1e12)] * len(ways)],
        ["in all", *(rounded(x / 1e12) for x in total)],
        ["times fewer", *(f"{total[0] / x:.1f}" for x in total)],
    ]


def write_table(path: Path, table: list[list[str]]) -> None:
    """Print a table and write it as the page takes it."""
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (table[0], ["---"] * len(table[0]), *table[1:])))
    record = {
        "command": "python tests/benchmarks/flops.py --output DIR",
        "hardware": f"torch's meta device, without weights; torch {torch.__version__.partition('+')[0]}",
        "date": date.today().isoformat(),
        "columns": table[0],
        "rows": table[1:],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", "utf8")


def main(options: Options) -> None:
    """Count, print the tables and write them."""
    options.output.mkdir(parents=True, exist_ok=True)
    editors = build_editors()
    with on_meta_device():
        weights = [weights_of(editor) for editor in editors]
        rows = [row_of(editor, side, options) for side in options.sides for editor in editors]
        parts = parts_table(editors[0], options.sides[0], options.edits)
    write_table(options.output / "flops.json", operations_table(rows))
    write_table(options.output / "flops-edit.json", parts)
    write_table(options.output / "flops-memory.json", memory_table(weights, rows, options.batch))


if __name__ == "__main__":
    main(tyro.cli(Options))
