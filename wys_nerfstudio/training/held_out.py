"""Cameras of the held-out views of a capture with fewer than two of them."""

from dataclasses import fields

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from wys_nerfstudio.training.interrupts import exit_on_error
from wys_nerfstudio.utils.errors import WysError


class FewCameras(Cameras):
    """Cameras of fewer than two held-out views. A sentence ends commands that cannot do with so few."""

    @classmethod
    def of(cls, cameras: Cameras) -> "FewCameras":
        """Return the same cameras as ones of this class."""
        return cls(**{field.name: getattr(cameras, field.name) for field in fields(cameras)})

    @exit_on_error()
    def to(self, device: "torch.device | str") -> "FewCameras":
        """Move the cameras to a device; `ns-render dataset` does so before it renders them.

        Raises:
            SystemExit: If there are none.
        """
        if len(self) == 0:
            raise WysError("No view is held out: --split train renders the training views instead.")
        return super().to(device)  # type: ignore

    @exit_on_error()
    def get_intrinsics_matrices(self) -> Float[Tensor, "n 3 3"]:
        """Refuse to interpolate: only `ns-render interpolate` calls this.

        Raises:
            SystemExit: Always.
        """
        raise WysError(
            "Fewer than two views are held out: --pose-source train interpolates between the training views instead."
        )
