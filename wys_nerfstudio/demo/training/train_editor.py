"""Training of the demo editor: `python -m wys_nerfstudio.demo.training.train_editor OUT`.

Stages: render the toy world, train the autoencoder, encode the images, train text encoder and UNet together. Every stage writes
its result to OUT/work and is skipped if the result exists. The last stage resumes from its checkpoint or, with `--begin-from`,
from a trained editor. OUT/editor is complete after the first export and replaced atomically.

Differences from InstructPix2Pix's recipe: for a dropped instruction the target is the unchanged image, not the edit, so that the
difference of the two predictions, which a relevance map measures, is the edit itself. And the UNet has an auxiliary segmentation
head during training (`Trainer.segmenter`): a 1x1 convolution on its last features that predicts ball, block, bear and the pixels
that the instruction changes. Without it the UNet never learns to distinguish ball and block: recognizing the objects reduces the
loss only if the noun in the instruction is used, and vice versa. The head is not part of the editor.
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

from wys_nerfstudio.demo.instructions import EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.training.data_set import render_data_set
from wys_nerfstudio.demo.training.editor_data import (
    NO_CHANGE,
    OBJECT_EDITS,
    Latents,
    draw_pairs,
    load_latents,
    tokenize,
)
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
from wys_nerfstudio.demo.training.validation import draw_curve, measure_maps
from wys_nerfstudio.demo.world import TRAIN_SEEDS, VALIDATION_SEEDS

MAX_TIMESTEP = 1000
FROM_BEFORE_TIMESTEP = 400
SEGMENTATION_WEIGHT = 2.0
VALIDATION_TIMESTEP = 800
VALIDATION_SCENES = 24


@dataclass
class Options:
    """Options of the training."""

    out: tyro.conf.Positional[Path]
    """Folder of the editor (out/editor) and of intermediate results (out/work)."""
    begin_from: Path | None = None
    """Folder of a trained editor to continue from: its autoencoder, averaged weights, sample count and training time."""
    seed: int = 0
    """Seed of weights and batches."""
    scenes: int = 5200
    """Number of training scenes, one view each."""
    vae_minutes: float = 10.0
    """Wall-clock budget of the autoencoder."""
    minutes: float = 57.0
    """Wall-clock budget of UNet and text encoder; the learning rate decays to zero at its end."""
    stop_after: int = 0
    """Stop after this many samples, for comparisons at equal sample counts; 0 for no limit."""
    batch_scenes: int = 16
    """Scenes per batch, with two samples each: two edits with the same noise and timestep."""
    empty_means: str = "no change"
    """Target for a dropped instruction: "no change", or "edit" as in InstructPix2Pix."""
    grounding_samples: int = 8000
    """Number of initial samples on which only the segmentation head's loss is used."""
    from_before: float = 0.5
    """Share of noised images, from timestep 400 on, that show the scene before the edit."""
    muon_rate: float = 2e-3
    """Muon's learning rate, for matrices and kernels."""
    adamw_rate: float = 1.5e-3
    """AdamW's learning rate, for the rest."""
    report_every: int = 8000
    """Samples between two validations; each validation also exports the editor."""


@dataclass
class Batch:
    """A batch of training samples."""

    inputs: Float[Tensor, "b 8 h w"]
    """Noised latents and image condition."""
    timestep: Int[Tensor, " b"]
    """Timestep of the noised latents."""
    tokens: Int[Tensor, "b tokens"]
    """Tokens of the instruction."""
    target: Float[Tensor, "b 4 h w"]
    """Target v."""
    weight: Float[Tensor, "b 1 h w"]
    """Weights of the squared errors."""
    segmentation: Float[Tensor, "b 4 h w"]
    """Target of the segmentation head: 1 for pixels of ball, block, bear, and for pixels that the instruction changes."""
    complete: Bool[Tensor, " b"]
    """Whether neither the instruction nor the image condition is dropped."""


class Trainer:
    """UNet, text encoder, their moving averages and the optimizer."""

    def __init__(self, options: Options, vae: AutoencoderKL, tokens: list[Tensor]) -> None:
        torch.manual_seed(options.seed)
        self.options, self.vae, self.tokens = options, vae, tokens
        self.unet, self.text_encoder = build_unet_and_text_encoder()
        self.average = deepcopy((self.unet, self.text_encoder))
        self.segmenter = nn.Conv2d(self.unet.config["block_out_channels"][0], len(OBJECT_EDITS) + 1, 1)
        self.unet.up_blocks[-1].register_forward_hook(self._keep_features)
        self.optimizer = MuonAndAdamW(
            [self.unet, self.text_encoder, self.segmenter], muon_rate=options.muon_rate, adamw_rate=options.adamw_rate
        )
        self.alphas_cumprod = build_scheduler().alphas_cumprod
        self.step, self.first_step, self.seconds = 0, 0, 0.0
        self.log: list[dict] = []

    def begin_from(self, folder: Path) -> None:
        """Load the averaged weights and the log of a trained editor; optimizer and segmentation head are not restored."""
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
        """Number of samples trained on."""
        return self.step * 2 * self.options.batch_scenes

    def make_batch(self, data: Sequence[Latents]) -> "Batch":
        """Return the next batch, which depends on seed and step only."""
        draw = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        shares = torch.tensor([float(len(part.codes)) for part in data])
        part = data[int(torch.multinomial(shares, 1, generator=draw))]
        count = self.options.batch_scenes
        scenes = torch.randint(len(part.codes), (count,), generator=draw).repeat_interleave(2)
        edits = draw_pairs(count, draw).flatten()
        chance = torch.rand(2 * count, generator=draw)
        drop_text, drop_image, drop_both = chance < 0.10, (chance >= 0.10) & (chance < 0.15), chance >= 0.95
        variants = torch.rand(2 * count, generator=draw).tolist()
        rows = [len(EDITS) if drop else int(e) for e, drop in zip(edits, drop_text | drop_both)]
        tokens = torch.stack([self.tokens[r][int(u * len(self.tokens[r]))] for r, u in zip(rows, variants)])
        target_edits = edits
        if self.options.empty_means == "no change":
            target_edits = torch.where(drop_text, NO_CHANGE, edits)
        # More samples at high noise levels, where the edited region is determined and relevance is computed.
        u = torch.rand(count, generator=draw).repeat_interleave(2)
        timestep = (u**0.65 * MAX_TIMESTEP).long().clamp_max(MAX_TIMESTEP - 1)
        # Some noised latents are of the unedited image, as in a relevance map and at the start of a local edit. Then both
        # samples of a scene have the same input and differ in the instruction only.
        from_before = (torch.rand(count, generator=draw) < self.options.from_before).repeat_interleave(2)
        from_before &= (timestep >= FROM_BEFORE_TIMESTEP) & ~drop_image & ~drop_both

        before = part.codes[scenes, NO_CHANGE].float()
        scale = self.vae.config["scaling_factor"]
        after = part.codes[scenes, target_edits].float() * scale
        noise = torch.randn(after[::2].shape, generator=draw).repeat_interleave(2, 0)
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noised = torch.where(from_before.view(-1, 1, 1, 1), before * scale, after)
        noised = alpha.sqrt() * noised + (1 - alpha).sqrt() * noise
        target = (alpha.sqrt() * noised - after) / (1 - alpha).sqrt()
        before = torch.where((drop_image | drop_both).view(-1, 1, 1, 1), 0.0, before)
        local = torch.tensor([edit.kind in LOCAL_KINDS for edit in EDITS])[edits]
        changed = part.changed[scenes, edits] & local.view(-1, 1, 1)
        # Pixels that the other edit of the pair changes get the same weight: they must stay unchanged.
        changed |= changed.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        objects = [part.changed[scenes][:, numbers].any(1) for numbers in OBJECT_EDITS]
        return Batch(
            inputs=torch.cat([noised, before], 1).to(memory_format=torch.channels_last),
            timestep=timestep,
            tokens=tokens,
            target=target,
            weight=1 + 3.0 * changed[:, None],
            segmentation=torch.stack([*objects, part.changed[scenes, edits]], 1).float(),
            complete=~(drop_text | drop_image | drop_both),
        )

    def train_step(self, data: Sequence[Latents], factor: float) -> float:
        """Perform one optimizer step and return the denoising loss."""
        batch = self.make_batch(data)
        with autocast():
            text = self.text_encoder(batch.tokens).last_hidden_state
            output = self.unet(batch.inputs, batch.timestep, encoder_hidden_states=text).sample
            logits = self.segmenter(self._features)
        denoising = (batch.weight * (output.float() - batch.target) ** 2).mean()
        # Objects are small: without the weight the head would converge to all zeros first.
        segmentation = F.binary_cross_entropy_with_logits(
            logits.float(), batch.segmentation, reduction="none", pos_weight=torch.tensor(4.0)
        )
        loss = SEGMENTATION_WEIGHT * (segmentation * batch.complete.view(-1, 1, 1, 1)).mean()
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
        """Return the averaged networks."""
        return Networks(unet=self.average[0], vae=self.vae, text_encoder=self.average[1])

    def _modules(self) -> tuple[nn.Module, ...]:
        return self.unet, self.text_encoder, self.segmenter, *self.average

    def save(self, file: Path) -> None:
        """Write a checkpoint atomically."""
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
        """Restore a checkpoint."""
        state = torch.load(file, weights_only=True)
        for module, part in zip(self._modules(), state["modules"]):
            module.load_state_dict(part)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.first_step = state["step"], state["first_step"]
        self.seconds, self.log = state["seconds"], state["log"]


@torch.inference_mode()
def validate(trainer: Trainer, data: Latents, images: Path) -> dict[str, float]:
    """Compute the average precision of raw relevance maps on validation scenes.

    Args:
        trainer: Trainer whose averaged networks are evaluated.
        data: Latents of the validation scenes.
        images: Array file of their images.

    Returns:
        Mean average precision by edit and overall for N = 1 and 4, and the wrong-object ratio.
    """
    unet, text_encoder = trainer.average
    raw = torch.from_numpy(np.load(images, mmap_mode="c")[:VALIDATION_SCENES])
    changed = (raw != raw[:, NO_CHANGE : NO_CHANGE + 1]).any(-1)
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

    return measure_maps(predict, changed)


def train(options: Options, trainer: Trainer, data: Sequence[Latents], check: tuple[Latents, Path]) -> None:
    """Train until the end of the budget, with regular validation, export and checkpoints.

    Args:
        options: Options of the training.
        trainer: The trainer.
        data: Latents of the training scenes, per image size.
        check: Latents and images of the validation scenes.
    """
    work, editor = options.out / "work", options.out / "editor"
    budget, reported, losses = options.minutes * 60, trainer.samples, []
    start = time.monotonic() - trainer.seconds
    while True:
        trainer.seconds = time.monotonic() - start
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
            draw_curve(trainer.log, editor / "curve.png", draws=4)
            line = trainer.log[-1]
            print(
                f"editor: {line['samples']} samples, {line['seconds']:.0f} s, loss {line['loss']:.4f}, "
                f"AP {line['AP N=1']:.3f} (N=1) {line['AP N=4']:.3f} (N=4), "
                f"ratio {line['wrong-object ratio (median)']:.1f}",
                flush=True,
            )
        if done:
            return
        warmup = min(1.0, (trainer.step - trainer.first_step + 1) / 100)
        # Full rate for half of the budget, then linear decay to zero.
        factor = min(1.0, 2 * (1 - progress)) * warmup
        losses.append(trainer.train_step(data, max(factor, 0.0)))


def main(options: Options) -> None:
    """Run all stages."""
    work = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    images = render_data_set(work / "images", TRAIN_SEEDS[: options.scenes])
    held_out = render_data_set(work / "validation", VALIDATION_SEEDS[:160])
    if not options.begin_from and not (work / "vae").exists():
        log: list[dict] = []
        vae = train_vae(images, seed=options.seed, seconds=60 * options.vae_minutes, log=log)
        vae.save_pretrained(work / "vae")
        (work / "vae.json").write_text(json.dumps(log, indent=1) + "\n")
    vae_folder = (options.begin_from or work) / "vae"
    vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    codes = encode_data_set(vae, images, work / "latents")
    data = [load_latents(*files) for files in zip(images, codes)]
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
