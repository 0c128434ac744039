"""First stage of the demo editor's training: the autoencoder and the latents of the data set."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from wys_nerfstudio.demo.training.networks import build_vae
from wys_nerfstudio.demo.training.optimizers import MuonAndAdamW, autocast

BATCH = 24
MUON_RATE = 2e-3
ADAMW_RATE = 2e-3
KL_WEIGHT = 1e-6
L1_WEIGHT = 0.05


def to_network(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Convert 8-bit images to the networks' range [-1, 1]."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def train_vae(
    files: Sequence[Path], *, seed: int, seconds: float, log: list[dict], vae: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train the autoencoder for a given time; the learning rate decays to zero.

    Args:
        files: Array files of the images, one per size, each "scenes edits h w 3".
        seed: Seed of weights and batches.
        seconds: Wall-clock budget.
        log: Receives an entry every 100 steps.
        vae: Autoencoder to continue training; by default a new one.

    Returns:
        The autoencoder; latents multiplied by its scaling factor have unit standard deviation.
    """
    torch.manual_seed(seed)
    vae = vae or build_vae()
    fit_vae(vae, files, seed=seed, seconds=seconds, log=log)
    with torch.inference_mode():
        images = np.load(files[0], mmap_mode="c")
        sample = to_network(torch.from_numpy(images[:40].reshape(-1, *images.shape[2:])[::3]))
        vae.register_to_config(scaling_factor=1 / float(vae.encode(sample).latent_dist.mode().std()))  # type: ignore
    return vae


def fit_vae(
    vae: AutoencoderKL | AutoencoderKLFlux2,
    files: Sequence[Path],
    *,
    seed: int,
    seconds: float,
    log: list[dict],
    crop: tuple[int, int] | None = None,
) -> None:
    """Train an autoencoder of either class in place.

    Args:
        vae: The autoencoder.
        files: As in `train_vae`.
        seed: Seed of the batches.
        seconds: As in `train_vae`.
        log: As in `train_vae`.
        crop: Height and width in pixels of random crops; None for whole images.
    """
    draw = np.random.default_rng(seed)
    arrays = [np.load(file, mmap_mode="c") for file in files]
    share = np.array([a.shape[0] for a in arrays], float)
    optimizer = MuonAndAdamW([vae], muon_rate=MUON_RATE, adamw_rate=ADAMW_RATE)
    start, step, errors = time.monotonic(), 0, []
    while (progress := (time.monotonic() - start) / seconds) < 1:
        array = arrays[draw.choice(len(arrays), p=share / share.sum())]
        which = draw.integers(array.shape[0], size=BATCH), draw.integers(array.shape[1], size=BATCH)
        images = array[which]
        if crop:
            top, left = (draw.integers(side - part + 1) for side, part in zip(images.shape[1:3], crop))
            images = images[:, top : top + crop[0], left : left + crop[1]]
        target = to_network(torch.from_numpy(images))
        with autocast():
            posterior = vae.encode(target).latent_dist  # type: ignore
            output = vae.decode(posterior.sample()).sample.float()  # type: ignore
        squared = F.mse_loss(output, target)
        loss = squared + L1_WEIGHT * F.l1_loss(output, target) + KL_WEIGHT * posterior.kl().sum() / target.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * progress)))
        errors.append(squared.item() / 4)
        step += 1
        if step % 100 == 0:
            psnr = -10 * math.log10(float(np.mean(errors[-100:])))
            log.append({"step": step, "samples": step * BATCH, "seconds": time.monotonic() - start, "psnr": psnr})
            print(f"vae: step {step}, {psnr:.2f} dB, {100 * progress:.0f} %", flush=True)
    vae.eval()


@torch.inference_mode()
def encode_data_set(vae: AutoencoderKL, files: Sequence[Path], folder: Path) -> list[Path]:
    """Encode all images and their mirror images as unscaled modes, the conditioning of InstructPix2Pix.

    Args:
        vae: The trained autoencoder.
        files: Array files of the images, one per size.
        folder: Output folder: one fp16 array "2*scenes edits 4 h/4 w/4" per size, mirrored scenes last; existing files are kept.

    Returns:
        The array files of the latents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vae.to(memory_format=torch.channels_last)  # type: ignore
    latents = []
    for file in files:
        latents.append(folder / file.name)
        if latents[-1].exists():
            continue
        images = np.load(file, mmap_mode="c")
        scenes, edits, height, width, _ = images.shape
        codes = np.empty((2, scenes, edits, 4, height // 4, width // 4), np.float16)
        for scene in range(0, scenes, 4):
            batch = to_network(torch.from_numpy(images[scene : scene + 4].reshape(-1, height, width, 3)))
            for side, views in enumerate((batch, batch.flip(-1))):
                with autocast():
                    mode = vae.encode(views.to(memory_format=torch.channels_last)).latent_dist.mode()  # type: ignore
                codes[side, scene : scene + 4] = mode.float().numpy().reshape(-1, *codes.shape[2:])
        part = latents[-1].with_suffix(".part")
        with part.open("wb") as stream:
            np.save(stream, codes.reshape(2 * scenes, *codes.shape[2:]))
        part.rename(latents[-1])
    return latents
