"""Trains the demo editor from a seed: `python -m wys_nerfstudio.demo.training.train_editor OUT`.

Stages: render the toy world, train the autoencoder, encode the pictures, train text encoder and UNet together. Every
stage leaves its result in OUT/work and is skipped when it is there; the last stage goes on from its checkpoint, or, with
`--begin-from`, from an editor that was trained before. OUT/editor is a complete editor from the first export on, swapped in
whole. Not here: what its batches are drawn from (`editor_data.py`) and the held-out figures (`evaluate_editor.py`).

How it differs from InstructPix2Pix's recipe: a dropped instruction is trained toward "no change", not toward the edit.
The difference of the two predictions is then exactly the edit, which is what a relevance map measures. And the UNet
learns to point (`Trainer.pointer`): a 1x1 convolution on its last features says where ball, block and bear are and what the
instruction changes. Without it ball and block are never told apart: to see which object is which and to hear which one is
named only pays together, and from random weights neither is found without the other. The pointer is no part of the editor.
"""

import json
import os
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from wys_nerfstudio import relevance
from wys_nerfstudio.demo.instructions import BY_SLUG, EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.training.data_set import render_data_set
from wys_nerfstudio.demo.training.editor_data import INDEX, NO_CHANGE, Latents, draw_pairs, load_latents, tokenize
from wys_nerfstudio.demo.training.networks import (
    Networks,
    build_scheduler,
    build_unet_and_text_encoder,
    words,
    write_editor,
    write_tokenizer,
)
from wys_nerfstudio.demo.training.optimizers import MuonAndAdamW, autocast
from wys_nerfstudio.demo.training.train_vae import encode_data_set, train_vae
from wys_nerfstudio.demo.world import TRAIN_SEEDS, VALIDATION_SEEDS
from wys_nerfstudio.evaluation import metrics

OBJECT_EDITS = [[INDEX[edit.slug] for edit in EDITS if edit.target == target] for target in ("ball", "block", "bear")]
MAX_TIMESTEP = 1000
FROM_BEFORE_TIMESTEP = 400
POINTING_WEIGHT = 2.0
VALIDATION_TIMESTEP = 800
VALIDATION_SCENES = 24


@dataclass
class Options:
    """Options of the training."""

    out: tyro.conf.Positional[Path]
    """Folder of the editor (out/editor) and of everything on the way (out/work)."""
    begin_from: Path | None = None
    """Editor folder that OUT goes on from: its autoencoder, averaged weights, samples and minutes so far."""
    seed: int = 0
    """Of weights and batches."""
    scenes: int = 5200
    """Training scenes, one view each."""
    vae_minutes: float = 10.0
    """Wall-clock budget of the autoencoder."""
    minutes: float = 57.0
    """Wall-clock budget of UNet and text encoder; the learning rate falls to zero by its end."""
    stop_after: int = 0
    """Stop after that many samples (0: at the end of the budget); for comparisons at equal samples."""
    batch_scenes: int = 16
    """Scenes per batch; each gives two samples, two edits with the same noise and timestep."""
    empty_means: str = "no change"
    """What a dropped instruction is trained toward: "no change", or "edit" as InstructPix2Pix does it."""
    grounding_samples: int = 8000
    """First samples, from which only pointing is learned."""
    from_before: float = 0.5
    """Share of noised pictures (from timestep 400 on) that show the scene before the edit."""
    muon_rate: float = 2e-3
    """Muon's learning rate, for matrices and kernels."""
    adamw_rate: float = 1.5e-3
    """AdamW's learning rate, for the rest."""
    report_every: int = 8000
    """Samples between two looks at the validation scenes, each with an export."""


@dataclass
class Batch:
    """What one step is trained on."""

    inputs: Float[Tensor, "b 8 h w"]
    """Noised latents and the condition's."""
    timestep: Int[Tensor, " b"]
    """Noise level of the former."""
    tokens: Int[Tensor, "b tokens"]
    """Instruction."""
    target: Float[Tensor, "b 4 h w"]
    """v."""
    weight: Float[Tensor, "b 1 h w"]
    """Of the squared errors."""
    places: Float[Tensor, "b 4 h w"]
    """1 where ball, block, bear are and where the instruction changes something, else 0."""
    complete: Bool[Tensor, " b"]
    """Whether both instruction and picture are there."""


class Trainer:
    """UNet, text encoder, their moving average and the optimizer."""

    def __init__(self, options: Options, vae: AutoencoderKL, tokens: list[Tensor]) -> None:
        torch.manual_seed(options.seed)
        self.options, self.vae, self.tokens = options, vae, tokens
        self.unet, self.text_encoder = build_unet_and_text_encoder()
        self.average = deepcopy((self.unet, self.text_encoder))
        self.pointer = nn.Conv2d(self.unet.config["block_out_channels"][0], len(OBJECT_EDITS) + 1, 1)
        self.unet.up_blocks[-1].register_forward_hook(self._keep_features)
        self.optimizer = MuonAndAdamW(
            [self.unet, self.text_encoder, self.pointer], muon_rate=options.muon_rate, adamw_rate=options.adamw_rate
        )
        self.alphas_cumprod = build_scheduler().alphas_cumprod
        self.step, self.first_step, self.seconds = 0, 0, 0.0
        self.log: list[dict] = []

    def begin_from(self, folder: Path) -> None:
        """Takes over another training's averaged weights and log; the optimizer and the pointer begin anew."""
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        for networks in ((self.unet, self.text_encoder), self.average):
            networks[0].load_state_dict(unet.state_dict())
            networks[1].load_state_dict(text_encoder.state_dict())
        self.log = json.loads((folder / "training.json").read_text())
        self.step = self.first_step = self.log[-1]["samples"] // (2 * self.options.batch_scenes)
        self.seconds = self.log[-1]["seconds"]

    def _keep_features(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._features = output

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return self.step * 2 * self.options.batch_scenes

    def make_batch(self, data: Sequence[Latents]) -> "Batch":
        """Draws the next batch; depends on seed and step only."""
        draw = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        shares = torch.tensor([float(len(part.codes)) for part in data])
        part = data[int(torch.multinomial(shares, 1, generator=draw))]
        count = self.options.batch_scenes
        scenes = torch.randint(len(part.codes), (count,), generator=draw).repeat_interleave(2)
        edits = draw_pairs(count, draw).flatten()
        chance = torch.rand(2 * count, generator=draw)
        no_text, no_image, nothing = chance < 0.10, (chance >= 0.10) & (chance < 0.15), chance >= 0.95
        variants = torch.rand(2 * count, generator=draw).tolist()
        rows = [len(EDITS) if drop else int(e) for e, drop in zip(edits, no_text | nothing)]
        tokens = torch.stack([self.tokens[r][int(u * len(self.tokens[r]))] for r, u in zip(rows, variants)])
        goal = edits
        if self.options.empty_means == "no change":
            goal = torch.where(no_text, NO_CHANGE, edits)
        # Skewed to the noisy half, where what to change is decided and where relevance is measured.
        u = torch.rand(count, generator=draw).repeat_interleave(2)
        timestep = (u**0.65 * MAX_TIMESTEP).long().clamp_max(MAX_TIMESTEP - 1)
        # What is noised is sometimes not the goal but the picture before, as in a relevance map and at the start of a
        # local edit: only the instruction then says what to change. Both samples of a scene then have the same input.
        from_before = (torch.rand(count, generator=draw) < self.options.from_before).repeat_interleave(2)
        from_before &= (timestep >= FROM_BEFORE_TIMESTEP) & ~no_image & ~nothing

        before = part.codes[scenes, NO_CHANGE].float()
        scale = self.vae.config["scaling_factor"]
        after = part.codes[scenes, goal].float() * scale
        noise = torch.randn(after[::2].shape, generator=draw).repeat_interleave(2, 0)
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noised = torch.where(from_before.view(-1, 1, 1, 1), before * scale, after)
        noised = alpha.sqrt() * noised + (1 - alpha).sqrt() * noise
        target = (alpha.sqrt() * noised - after) / (1 - alpha).sqrt()
        before = torch.where((no_image | nothing).view(-1, 1, 1, 1), 0.0, before)
        local = torch.tensor([edit.kind in LOCAL_KINDS for edit in EDITS])[edits]
        changed = part.changed[scenes, edits] & local.view(-1, 1, 1)
        # What the other edit of the pair changes counts as much: leaving it alone is half of knowing what was named.
        changed |= changed.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        objects = [part.changed[scenes][:, numbers].any(1) for numbers in OBJECT_EDITS]
        return Batch(
            inputs=torch.cat([noised, before], 1).to(memory_format=torch.channels_last),
            timestep=timestep,
            tokens=tokens,
            target=target,
            weight=1 + 3.0 * changed[:, None],
            places=torch.stack([*objects, part.changed[scenes, edits]], 1).float(),
            complete=~(no_text | no_image | nothing),
        )

    def train_step(self, data: Sequence[Latents], factor: float) -> float:
        """One optimizer step; returns the loss of the denoising."""
        batch = self.make_batch(data)
        with autocast():
            text = self.text_encoder(batch.tokens).last_hidden_state
            output = self.unet(batch.inputs, batch.timestep, encoder_hidden_states=text).sample
            pointed = self.pointer(self._features)
        denoising = (batch.weight * (output.float() - batch.target) ** 2).mean()
        # Objects are small; without the weight "nowhere" would be the first answer to be learned.
        pointing = F.binary_cross_entropy_with_logits(
            pointed.float(), batch.places, reduction="none", pos_weight=torch.tensor(4.0)
        )
        loss = POINTING_WEIGHT * (pointing * batch.complete.view(-1, 1, 1, 1)).mean()
        if self.samples >= self.options.grounding_samples:
            loss = loss + denoising
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(factor)
        self.step += 1
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for averaged, module in zip(self.average, (self.unet, self.text_encoder)):
                torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - decay)  # type: ignore
        return denoising.item()

    def networks(self) -> Networks:
        """The averaged networks."""
        return Networks(unet=self.average[0], vae=self.vae, text_encoder=self.average[1])

    def _modules(self) -> tuple[nn.Module, ...]:
        return self.unet, self.text_encoder, self.pointer, *self.average

    def save(self, file: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        state = {
            "modules": [m.state_dict() for m in self._modules()],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "first_step": self.first_step,
            "seconds": self.seconds,
            "log": self.log,
        }
        torch.save(state, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)

    def load(self, file: Path) -> None:
        """Goes on where `save` stopped."""
        state = torch.load(file, weights_only=True)
        for module, part in zip(self._modules(), state["modules"]):
            module.load_state_dict(part)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.first_step = state["step"], state["first_step"]
        self.seconds, self.log = state["seconds"], state["log"]


def _mean_precision(maps: Tensor, masks: Tensor) -> float:
    return float(np.mean([metrics.average_precision(m, t) for m, t in zip(maps, masks) if t.any()]))


@torch.inference_mode()
def validate(trainer: Trainer, data: Latents, pictures: Path) -> dict[str, float]:
    """Average precision of raw relevance maps on fixed validation scenes, for the curve.

    Args:
        trainer: whose averaged networks are looked at.
        data: encoded validation scenes.
        pictures: the same as pictures.

    Returns:
        Mean average precision by edit and overall for N = 1 and 4, and the wrong-object ratio.
    """
    unet, text_encoder = trainer.average
    raw = torch.from_numpy(np.load(pictures, mmap_mode="c")[:VALIDATION_SCENES])
    truth = (raw != raw[:, NO_CHANGE : NO_CHANGE + 1]).any(-1)
    condition = data.codes[:VALIDATION_SCENES, NO_CHANGE].float()
    clean = condition * trainer.vae.config["scaling_factor"]
    alpha = trainer.alphas_cumprod[VALIDATION_TIMESTEP]
    noise = torch.randn(4, *clean.shape, generator=torch.Generator().manual_seed(0))

    def predict(row: int) -> Tensor:
        with autocast():
            text = text_encoder(trainer.tokens[row][:1]).last_hidden_state.expand(len(clean), -1, -1)
            noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            steps = torch.full((len(clean),), VALIDATION_TIMESTEP)
            return torch.stack(
                [unet(torch.cat([n, condition], 1), steps, encoder_hidden_states=text).sample.float() for n in noised]
            )

    empty, result, ratios = predict(len(EDITS)), {}, []
    objects = {name: truth[:, INDEX[slug]] for name, slug in (("ball", "ball-red"), ("block", "block-red"))}
    objects["bear"] = truth[:, INDEX["panda"]] | truth[:, INDEX["polar-bear"]]
    single = []
    for edit in EDITS:
        if edit.kind not in LOCAL_KINDS:
            continue
        draws = (predict(INDEX[edit.slug]) - empty).abs().mean(2)
        masks = truth[:, INDEX[edit.slug]]
        maps = relevance.resize(draws.mean(0), *truth.shape[2:])
        result[f"AP {edit.slug} N=4"] = _mean_precision(maps, masks)
        single.append(_mean_precision(relevance.resize(draws[0], *truth.shape[2:]), masks))
        named = edit.target if edit.target in objects else "bear"
        for m, t, *others in zip(maps, masks, *(v for k, v in objects.items() if k != named)):
            elsewhere = torch.stack(others).any(0) & ~t
            if t.any() and elsewhere.any():
                ratios.append((m[t].mean() / m[elsewhere].mean()).item())
    result["AP N=4"] = float(np.mean([result[key] for key in result]))
    result["AP N=1"] = float(np.mean(single))
    result["wrong-object ratio (median)"] = float(np.median(ratios))
    return result


def draw_curve(log: list[dict], file: Path) -> None:
    """The log as a picture: average precision over samples."""
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
        axes.plot(samples, [np.mean([line[f"AP {slug} N=4"] for slug in slugs]) for line in log], label=kind)
    axes.set(xlabel="samples", ylabel="average precision, validation", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def train(options: Options, trainer: Trainer, data: Sequence[Latents], check: tuple[Latents, Path]) -> None:
    """Trains until the budget is spent; reports, exports and saves on the way."""
    work, editor = options.out / "work", options.out / "editor"
    budget, reported, losses = options.minutes * 60, trainer.samples, []
    begun = time.monotonic() - trainer.seconds
    while True:
        trainer.seconds = time.monotonic() - begun
        progress = trainer.seconds / budget
        done = progress >= 1 or bool(options.stop_after and trainer.samples >= options.stop_after)
        if done or trainer.samples - reported >= options.report_every:
            reported = trainer.samples
            line = {"samples": trainer.samples, "seconds": trainer.seconds, "loss": float(np.mean(losses or [0]))}
            losses = []
            trainer.log.append(line | validate(trainer, *check))
            trainer.save(work / "editor.pt")
            write_editor(editor, trainer.networks())
            (editor / "training.json").write_text(json.dumps(trainer.log, indent=1) + "\n")
            draw_curve(trainer.log, editor / "curve.png")
            line = trainer.log[-1]
            print(
                f"editor: {line['samples']} samples, {line['seconds']:.0f} s, loss {line['loss']:.4f}, "
                f"AP {line['AP N=1']:.3f} (N=1) {line['AP N=4']:.3f} (N=4), "
                f"ratio {line['wrong-object ratio (median)']:.1f}",
                flush=True,
            )
        if done:
            return
        apply_lr_warmup = min(1.0, (trainer.step - trainer.first_step + 1) / 100)
        # Half of the budget at full rate, then down to zero.
        factor = min(1.0, 2 * (1 - progress)) * apply_lr_warmup
        losses.append(trainer.train_step(data, max(factor, 0.0)))


def main(options: Options) -> None:
    """Runs all stages."""
    work = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    pictures = render_data_set(work / "pictures", TRAIN_SEEDS[: options.scenes])
    held_out = render_data_set(work / "validation", VALIDATION_SEEDS[:160])
    if not options.begin_from and not (work / "vae").exists():
        log: list[dict] = []
        vae = train_vae(pictures, seed=options.seed, seconds=60 * options.vae_minutes, log=log)
        vae.save_pretrained(work / "vae")
        (work / "vae.json").write_text(json.dumps(log, indent=1) + "\n")
    vae_folder = (options.begin_from or work) / "vae"
    vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    codes = encode_data_set(vae, pictures, work / "latents")
    data = [load_latents(*files) for files in zip(pictures, codes)]
    check = load_latents(held_out[0], encode_data_set(vae, held_out[:1], work / "validation-latents")[0])
    write_tokenizer(work / "tokenizer", words())
    trainer = Trainer(options, vae, tokenize(work))
    if (work / "editor.pt").exists():
        trainer.load(work / "editor.pt")
    elif options.begin_from:
        trainer.begin_from(options.begin_from)
    train(options, trainer, data, (check, held_out[0]))


if __name__ == "__main__":
    main(tyro.cli(Options))
