"""LPIPS on AlexNet features, based on torchmetrics.

torchmetrics contains the linear layers of LPIPS. The AlexNet weights (233 MB) are torchvision's and are read from a given file,
from torch's cache or from the network, in this order. The public `LearnedPerceptualImagePatchSimilarity` has equal values and
gradients, but cannot read AlexNet from a file: its constructor requires the cache or the network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import is_memory_error

MIN_LPIPS_PATCH = 32
"""Minimum side length in pixels: AlexNet's pooling layers reduce smaller images to zero size."""


class Lpips(nn.Module):
    """Learned perceptual distance of image batches; differentiable in its inputs, its own weights are frozen.

    Args:
        weights: torchvision's AlexNet state dict as a file; by default torch's cache, then the network.

    Raises:
        WysError: If the weights cannot be loaded.
    """

    def __init__(self, weights: Optional[Path] = None) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS as TorchmetricsLpips

        self.net = TorchmetricsLpips(pretrained=True, net="alex", pnet_rand=True)
        layers = {
            f"features.{name.rsplit('.', 1)[-1]}": module
            for name, module in self.net.net.named_modules()
            if isinstance(module, nn.Conv2d)
        }
        _load_alexnet(layers, weights)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Lpips":
        """Stay in eval mode: dropout would make the distance random."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "b 3 h w"], references: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Return the mean LPIPS of images in [0, 1]; 0 for equal images."""
        return self.net(images, references, normalize=True).mean()


def lpips_is_cached(weights: Optional[Path]) -> bool:
    """Return whether `Lpips` can be constructed without network access."""
    return (weights or alexnet_file()).is_file()


def alexnet_file() -> Path:
    """Return the file of AlexNet's weights in torch's cache, whether it exists or not."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]


def _load_alexnet(layers: Mapping[str, nn.Module], weights: Optional[Path]) -> None:
    remedy = (
        "Give a file of torchvision's AlexNet weights with --pipeline.model.lpips-weights, or train without the "
        "perceptual loss: --pipeline.model.lpips-loss-mult 0."
    )
    try:
        if weights is not None:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            from torchvision.models import AlexNet_Weights

            state = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
        for name, layer in layers.items():
            layer.load_state_dict({key: state[f"{name}.{key}"] for key in ("weight", "bias")})
    except Exception as error:  # network, disk and unpickling errors have the same remedy
        if is_memory_error(error):
            raise
        source = f'from "{weights}"' if weights is not None else "by torch (is there a network?)"
        raise WysError(f"The AlexNet weights of the LPIPS loss could not be loaded {source}. {remedy}") from error
