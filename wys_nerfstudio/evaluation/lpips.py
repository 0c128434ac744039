"""LPIPS on AlexNet features, from torchmetrics, with a say in where AlexNet's weights come from.

torchmetrics brings LPIPS's own linear layers; AlexNet (233 MB) is torchvision's and is looked for in a given file, in
torch's cache, on the network, in this order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wys_nerfstudio.utils.errors import WysError

MIN_LPIPS_PATCH = 32
"""Side in pixels below which AlexNet's pooling leaves nothing."""


class Lpips(nn.Module):
    """Learned perceptual distance of image batches; differentiable in its inputs, its own weights are frozen.

    Args:
        weights: torchvision's AlexNet state dict as a file; by default torch's cache, then the network.

    Raises:
        WysError: If the weights are not to be had.
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
        """Stays in eval mode: a measure has no dropout."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "b 3 h w"], references: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Mean LPIPS of images in [0, 1]; 0 for equal ones."""
        return self.net(images, references, normalize=True).mean()


def lpips_is_cached(weights: Optional[Path]) -> bool:
    """Whether `Lpips` can be built without the network."""
    if weights is not None:
        return weights.is_file()
    from torchvision.models import AlexNet_Weights

    return (Path(torch.hub.get_dir()) / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]).is_file()


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
    except Exception as error:  # whatever the network, the disk or the unpickler says, the remedy is the same
        source = f'from "{weights}"' if weights is not None else "by torch (is there a network?)"
        raise WysError(f"The AlexNet weights of the LPIPS loss could not be loaded {source}. {remedy}") from error
