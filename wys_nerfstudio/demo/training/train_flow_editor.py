"""Training of the demo's flow-matching editor: `python -m wys_nerfstudio.demo.training.train_flow_editor OUT`.

Stages: render the toy world, train the autoencoder, encode the images, train text encoder and transformer together, first on
crops and then on whole images. Every stage writes its result to OUT/work and is skipped if the result exists; the last one
resumes from its checkpoint. OUT/flow_editor is complete after the first export and replaced atomically.

The recipe is that of `train_editor`: no change as the target of the empty instruction, pairs of edits that share noise and
time, noised latents of the unedited image, an auxiliary segmentation head. The head reads the reference tokens as well, which
show the objects without noise.
"""

import json
import os
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from wys_nerfstudio.demo.instructions import EDITS, LOCAL_KINDS
from wys_nerfstudio.demo.training.data_set import render_array
from wys_nerfstudio.demo.training.editor_data import (
    ENDINGS,
    NO_CHANGE,
    OBJECT_EDITS,
    Latents,
    draw_pairs,
    pooled_changes,
)
from wys_nerfstudio.demo.training.flow_networks import (
    FlowNetworks,
    build_tokenizer,
    build_transformer_and_text_encoder,
    build_vae,
    patchify,
    predict_velocity,
    tokenize,
    write_flow_editor,
)
from wys_nerfstudio.demo.training.optimizers import MuonAndAdamW, autocast
from wys_nerfstudio.demo.training.train_vae import fit_vae, to_network
from wys_nerfstudio.demo.training.validation import draw_curve, measure_maps
from wys_nerfstudio.demo.world import TRAIN_SEEDS, VALIDATION_SEEDS

WIDTH, HEIGHT = 80, 64
FROM_BEFORE_TIME = 0.4
SEGMENTATION_WEIGHT = 2.0
VALIDATION_TIME = 0.8
VALIDATION_SCENES = 16
VALIDATION_DRAWS = 1
CROP = 12
"""Height and width of the transformer's crops in tokens."""
VAE_CROP = (HEIGHT // 2, WIDTH // 2)
"""Height and width of the autoencoder's crops in pixels."""


@dataclass
class Options:
    """Options of the training."""

    out: tyro.conf.Positional[Path]
    """Folder of the editor (out/flow_editor) and of intermediate results (out/work)."""
    seed: int = 0
    """Seed of weights and batches."""
    scenes: int = 1024
    """Number of training scenes, one view each; a multiple of 16."""
    vae_minutes: float = 12.0
    """Wall-clock budget of the autoencoder."""
    minutes: float = 49.0
    """Wall-clock budget of transformer and text encoder; the learning rate decays to zero at its end."""
    crop_minutes: float = 36.0
    """Part of the budget spent on crops of 12 x 12 tokens, of which three times as many fit into the time."""
    batch_scenes: int = 8
    """Scenes per batch, with two samples each: two edits with the same noise and time."""
    grounding_samples: int = 4000
    """Number of initial samples on which only the segmentation head's loss is used."""
    from_before: float = 0.5
    """Share of noised images, from time 0.4 on, that show the scene before the edit."""
    muon_rate: float = 2e-3
    """Muon's learning rate, for matrices."""
    adamw_rate: float = 2e-3
    """AdamW's learning rate, for the rest."""
    report_minutes: float = 4.0
    """Time between two validations; each validation also exports the editor."""


@dataclass
class FlowBatch:
    """A batch of training samples."""

    noised: Float[Tensor, "b c h w"]
    """Noised latents."""
    reference: Float[Tensor, "b c h w"]
    """Latents of the unedited image."""
    time: Float[Tensor, " b"]
    """Share of noise in the noised latents, in [0, 1]."""
    tokens: Int[Tensor, "b n"]
    """Padded tokens of the instruction."""
    mask: Int[Tensor, "b n"]
    """1 for tokens, 0 for padding."""
    target: Float[Tensor, "b c h w"]
    """Target velocity."""
    weight: Float[Tensor, "b 1 h w"]
    """Weights of the squared errors."""
    segmentation: Float[Tensor, "b 4 h w"]
    """Target of the segmentation head: 1 for tokens of ball, block, bear, and for tokens that the instruction changes."""
    instructed: Bool[Tensor, " b"]
    """Whether the instruction is not dropped."""


class FlowTrainer:
    """Transformer, text encoder, their moving averages and the optimizer."""

    def __init__(self, options: Options, vae: AutoencoderKLFlux2) -> None:
        torch.manual_seed(options.seed)
        self.options, self.vae = options, vae
        tokenizer = build_tokenizer()
        texts = [[wording + end for wording in edit.wordings for end in ENDINGS] for edit in EDITS]
        self.texts = [tokenize(tokenizer, variants) for variants in [*texts, [""]]]
        self.transformer, self.text_encoder = build_transformer_and_text_encoder()
        self.average = deepcopy((self.transformer, self.text_encoder))
        self.segmenter = nn.Linear(self.transformer.inner_dim, len(OBJECT_EDITS) + 1)
        self.transformer.norm_out.register_forward_hook(self._keep_features)
        self.optimizer = MuonAndAdamW(
            [self.transformer, self.text_encoder, self.segmenter],
            muon_rate=options.muon_rate,
            adamw_rate=options.adamw_rate,
        )
        self.step, self.seconds = 0, 0.0
        self.log: list[dict] = []

    def _keep_features(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._features = output

    @property
    def samples(self) -> int:
        """Number of samples trained on."""
        return self.step * 2 * self.options.batch_scenes

    def make_batch(self, data: Latents, crop: int | None) -> FlowBatch:
        """Return the next batch, which depends on seed and step only.

        Args:
            data: Latents of the training scenes.
            crop: Height and width of a random crop in tokens; None for whole images.
        """
        draw = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        count = self.options.batch_scenes
        scenes = torch.randint(len(data.codes), (count,), generator=draw).repeat_interleave(2)
        edits = draw_pairs(count, draw).flatten()
        dropped = torch.rand(2 * count, generator=draw) < 0.10
        variants = torch.rand(2 * count, generator=draw).tolist()
        rows = [len(EDITS) if drop else int(e) for e, drop in zip(edits, dropped)]
        picks = [(row, int(u * len(self.texts[row][0]))) for row, u in zip(rows, variants)]
        tokens, mask = (torch.stack([self.texts[row][part][i] for row, i in picks]) for part in range(2))
        # More samples at high noise levels, where the edited region is determined and relevance is computed.
        time = 1 - 0.98 * (1 - torch.rand(count, generator=draw).repeat_interleave(2) ** 0.65)
        # As in `train_editor`, some noised latents are of the unedited image.
        from_before = (torch.rand(count, generator=draw) < self.options.from_before).repeat_interleave(2)
        from_before &= time >= FROM_BEFORE_TIME
        height, width = data.codes.shape[-2:]
        rows_shown, columns_shown = slice(height), slice(width)
        if crop:
            top, left = (int(torch.randint(side - crop + 1, (1,), generator=draw)) for side in (height, width))
            rows_shown, columns_shown = slice(top, top + crop), slice(left, left + crop)

        before = data.codes[scenes, NO_CHANGE, :, rows_shown, columns_shown].float()
        shown = torch.where(dropped, NO_CHANGE, edits)
        after = data.codes[scenes, shown, :, rows_shown, columns_shown].float()
        noise = torch.randn(after[::2].shape, generator=draw).repeat_interleave(2, 0)
        share = time.view(-1, 1, 1, 1)
        clean = torch.where(from_before.view(-1, 1, 1, 1), before, after)
        noised = (1 - share) * clean + share * noise
        all_changed = data.changed[scenes][..., rows_shown, columns_shown]
        instructed = all_changed[torch.arange(2 * count), edits]
        local = torch.tensor([edit.kind in LOCAL_KINDS for edit in EDITS])[edits]
        changed = instructed & local.view(-1, 1, 1)
        # Tokens that the other edit of the pair changes get the same weight: they must stay unchanged.
        changed |= changed.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        objects = [all_changed[:, numbers].any(1) for numbers in OBJECT_EDITS]
        return FlowBatch(
            noised=noised,
            reference=before,
            time=time,
            tokens=tokens,
            mask=mask,
            # The velocity with which the noised latents, whatever they show, reach the edited image.
            target=(noised - after) / share,
            weight=1 + 3.0 * changed[:, None],
            segmentation=torch.stack([*objects, instructed], 1).float(),
            instructed=~dropped,
        )

    def train_step(self, data: Latents, factor: float, crop: int | None) -> float:
        """Perform one optimizer step and return the loss of the velocity.

        Args:
            data: Latents of the training scenes.
            factor: Factor of the learning rates, in [0, 1].
            crop: As in `make_batch`.
        """
        batch = self.make_batch(data, crop)
        with autocast():
            velocity = predict_velocity(
                self.transformer, self.text_encoder, batch.noised, batch.reference, batch.time, batch.tokens, batch.mask
            )
            logits = self.segmenter(self._features)
        squared = batch.weight * (velocity.float() - batch.target) ** 2
        # Objects are small: without the weight the head would converge to all zeros first.
        entropy = F.binary_cross_entropy_with_logits(
            logits.float(),
            batch.segmentation.flatten(2).transpose(1, 2).repeat(1, 2, 1),
            reduction="none",
            pos_weight=torch.tensor(4.0),
        )
        denoising = squared.mean()
        loss = SEGMENTATION_WEIGHT * (entropy * batch.instructed.view(-1, 1, 1)).mean()
        if self.samples >= self.options.grounding_samples:
            loss = loss + denoising
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(factor)
        self.step += 1
        decay = min(0.995, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for averaged, module in zip(self.average, (self.transformer, self.text_encoder)):
                torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - decay)  # type: ignore
        return denoising.item()

    def networks(self) -> FlowNetworks:
        """Return the averaged networks."""
        return FlowNetworks(transformer=self.average[0], vae=self.vae, text_encoder=self.average[1])

    def _modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.text_encoder, self.segmenter, *self.average

    def save(self, file: Path) -> None:
        """Write a checkpoint atomically."""
        state = {
            "modules": [m.state_dict() for m in self._modules()],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
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
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]


@torch.inference_mode()
def validate(trainer: FlowTrainer, data: Latents, images: Path, level: float = VALIDATION_TIME) -> dict[str, float]:
    """Compute the average precision of raw relevance maps on validation scenes.

    Args:
        trainer: Trainer whose averaged networks are evaluated.
        data: Latents of the validation scenes.
        images: Array file of their images.
        level: Share of noise in the noised latents, in [0, 1].

    Returns:
        As in `measure_maps`.
    """
    raw = torch.from_numpy(np.load(images, mmap_mode="c")[:VALIDATION_SCENES])
    changed = (raw != raw[:, NO_CHANGE : NO_CHANGE + 1]).any(-1)
    clean = data.codes[:VALIDATION_SCENES, NO_CHANGE].float()
    noise = torch.randn(VALIDATION_DRAWS, *clean.shape, generator=torch.Generator().manual_seed(0))
    time = torch.full((len(clean),), level)

    def predict(row: int) -> Tensor:
        tokens, mask = (part[:1].expand(len(clean), -1) for part in trainer.texts[row])
        with autocast():
            return torch.stack(
                [
                    predict_velocity(*trainer.average, (1 - level) * clean + level * n, clean, time, tokens, mask)
                    for n in noise
                ]
            ).float()

    return measure_maps(predict, changed)


def train(options: Options, trainer: FlowTrainer, data: Latents, check: tuple[Latents, Path]) -> None:
    """Train until the end of the budget, with regular validation, export and checkpoints.

    Args:
        options: Options of the training.
        trainer: The trainer.
        data: Latents of the training scenes.
        check: Latents and images of the validation scenes.
    """
    work, editor = options.out / "work", options.out / "flow_editor"
    budget, reported, losses = options.minutes * 60, trainer.seconds, []
    start = time.monotonic() - trainer.seconds
    while True:
        trainer.seconds = time.monotonic() - start
        progress = trainer.seconds / budget
        if progress >= 1 or trainer.seconds - reported >= 60 * options.report_minutes:
            reported = trainer.seconds
            line = {"samples": trainer.samples, "seconds": trainer.seconds, "loss": float(np.mean(losses or [0]))}
            losses = []
            trainer.log.append(line | validate(trainer, *check))
            trainer.save(work / "flow_editor.pt")
            write_flow_editor(editor, trainer.networks())
            (editor / "training.json").write_text(json.dumps(trainer.log, indent=1) + "\n")
            draw_curve(trainer.log, editor / "curve.png", draws=VALIDATION_DRAWS)
            line = trainer.log[-1]
            print(
                f"flow editor: {line['samples']} samples, {line['seconds']:.0f} s, loss {line['loss']:.4f}, "
                f"AP {line['AP N=1']:.3f} (N=1) {line[f'AP N={VALIDATION_DRAWS}']:.3f} (N={VALIDATION_DRAWS}), "
                f"ratio {line['wrong-object ratio (median)']:.1f}",
                flush=True,
            )
        if progress >= 1:
            return
        # Full rate for half of the budget, then linear decay to zero.
        factor = min(1.0, 2 * (1 - progress)) * min(1.0, (trainer.step + 1) / 100)
        crop = CROP if trainer.seconds < 60 * options.crop_minutes else None
        losses.append(trainer.train_step(data, factor, crop))


@torch.inference_mode()
def set_normalization(vae: AutoencoderKLFlux2, images: Path) -> None:
    """Set mean and variance of the patchified latents, with which the editor normalizes them, from training images."""
    raw = np.load(images, mmap_mode="c")[:64, ::2]
    modes = [patchify(vae.encode(to_network(torch.from_numpy(views))).latent_dist.mode()) for views in raw]  # type: ignore
    latents = torch.cat(modes)
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))  # type: ignore
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))  # type: ignore


@torch.inference_mode()
def encode_images(vae: AutoencoderKLFlux2, images: Path, file: Path) -> Latents:
    """Encode images as normalized, patchified modes, unless the file exists.

    Args:
        vae: The trained autoencoder.
        images: Array file of the images, "scenes edits 4*h 4*w 3".
        file: Array file of the latents, fp16, "scenes edits c h w".
    """
    raw = np.load(images, mmap_mode="c")
    if not file.exists():
        mean, variance = vae.bn.running_mean, vae.bn.running_var
        deviation = (variance + vae.config["batch_norm_eps"]).sqrt()  # type: ignore
        codes = []
        for views in raw:
            with autocast():
                modes = vae.encode(to_network(torch.from_numpy(views))).latent_dist.mode()  # type: ignore
            codes.append((patchify(modes.float()) - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1))  # type: ignore
        part = file.with_suffix(".part")
        with part.open("wb") as stream:
            np.save(stream, torch.stack(codes).half().numpy())
        part.rename(file)
    return Latents(torch.from_numpy(np.load(file)), pooled_changes(raw))


def main(options: Options) -> None:
    """Run all stages."""
    work = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    images, held_out = work / "images.npy", work / "validation.npy"
    render_array(images, TRAIN_SEEDS[: options.scenes], WIDTH, HEIGHT)
    render_array(held_out, VALIDATION_SEEDS[:48], WIDTH, HEIGHT)
    if not (work / "vae").exists():
        log: list[dict] = []
        torch.manual_seed(options.seed)
        vae = build_vae()
        # Convolutions learn the same from crops, four of which fit into the time of an image.
        fit_vae(vae, [images], seed=options.seed, seconds=60 * options.vae_minutes, log=log, crop=VAE_CROP)
        set_normalization(vae, images)
        vae.save_pretrained(work / "vae")
        (work / "vae.json").write_text(json.dumps(log, indent=1) + "\n")
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    data = encode_images(vae, images, work / "latents.npy")
    check = encode_images(vae, held_out, work / "validation-latents.npy")
    trainer = FlowTrainer(options, vae)
    if (work / "flow_editor.pt").exists():
        trainer.load(work / "flow_editor.pt")
    train(options, trainer, data, (check, held_out))


if __name__ == "__main__":
    main(tyro.cli(Options))
