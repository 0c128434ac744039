"""The dual-head field: one hash-grid density backbone, a radiance head and a relevance head.

The backbone and the radiance head are nerfacto's, parameter for parameter, so that nerfacto checkpoints fit. The
relevance head receives the backbone's features detached and no view direction: relevance is a property of the place. Relevance of
free space, where there is no surface, comes from a visual hull (see `relevance.visual_hull`).
"""

from typing import Literal, Optional

import torch
from jaxtyping import Bool, Float, Shaped
from nerfstudio.cameras.rays import RaySamples
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.field_components.activations import trunc_exp
from nerfstudio.field_components.encodings import NeRFEncoding
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.field_components.mlp import MLP
from nerfstudio.fields.base_field import get_normalized_directions
from nerfstudio.fields.nerfacto_field import NerfactoField
from torch import Tensor, nn

from wys_nerfstudio.relevance.visual_hull import RelevanceHull, free_space

RelevanceInput = Literal["geometry", "geometry+position", "hashgrid"]


class WysField(NerfactoField):
    """Nerfacto's field with a relevance head.

    Args:
        aabb: Scene bounds, (2, 3).
        num_images: Number of training views.
        relevance_input: Input of the relevance head: the backbone's geometry features, these and a frequency encoding
            of the position, or the hash grid's own features (torch backend only).
        implementation: Backend of encodings and networks.
        **kwargs: As for `NerfactoField`.
    """

    def __init__(
        self,
        aabb: Shaped[Tensor, "2 3"],
        num_images: int,
        relevance_input: RelevanceInput = "geometry+position",
        implementation: Literal["tcnn", "torch"] = "tcnn",
        **kwargs,
    ) -> None:
        super().__init__(aabb, num_images, implementation=implementation, **kwargs)
        self.relevance_input = relevance_input
        width = self.geo_feat_dim
        if relevance_input == "geometry+position":
            # Torch backend on purpose: tiny, and its checkpoints then do not depend on tiny-cuda-nn.
            self.relevance_encoding = NeRFEncoding(
                in_dim=3, num_frequencies=6, min_freq_exp=0, max_freq_exp=5, include_input=True, implementation="torch"
            )
            width += self.relevance_encoding.get_out_dim()
        elif relevance_input == "hashgrid":
            width = self.mlp_base.model[0].get_out_dim()  # type: ignore
        self.mlp_relevance = MLP(
            in_dim=width,
            num_layers=3,
            layer_width=64,
            out_dim=1,
            activation=nn.ReLU(),
            out_activation=nn.Sigmoid(),
            implementation="torch",
        )
        self.relevance_hull = RelevanceHull()
        self.appearance_index: Optional[int] = None
        """Training view whose appearance embedding is rendered in eval mode; None renders the average."""

    def relevance_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the relevance head; all others belong to the scene."""
        return list(self.mlp_relevance.parameters())

    @torch.no_grad()
    def reset_relevance(self) -> None:
        """Reset the relevance head and free-space relevance, for another instruction."""
        self.relevance_hull.reset()
        for module in self.mlp_relevance.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    @torch.no_grad()
    def zero_relevance(self) -> None:
        """Make the relevance head return 0 everywhere, where given masks replace it."""
        output = [module for module in self.mlp_relevance.modules() if isinstance(module, nn.Linear)][-1]
        output.weight.zero_()
        output.bias.fill_(-30)

    def scene_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of backbone and radiance head, in nerfacto's order."""
        relevance = {id(p) for p in self.relevance_parameters()}
        return [p for p in self.parameters() if id(p) not in relevance]

    def get_relevance(
        self, ray_samples: RaySamples, density_embedding: Float[Tensor, "rays samples features"], every: int = 1
    ) -> Float[Tensor, "some samples 1"]:
        """Return relevance in [0, 1] at samples. No gradient reaches its inputs.

        Args:
            ray_samples: The samples.
            density_embedding: Their geometry features.
            every: 2 for every second ray only, and so on.
        """
        some = density_embedding[::every].detach()
        geometry = some.reshape(-1, self.geo_feat_dim).float()
        positions = self._grid_positions(ray_samples.frustums.get_positions()[::every].detach())[0].reshape(-1, 3)
        if self.relevance_input == "geometry":
            inputs = geometry
        elif self.relevance_input == "geometry+position":
            inputs = torch.cat([geometry, self.relevance_encoding(positions * 2 - 1)], dim=-1)
        else:
            inputs = self.mlp_base.model[0](positions).detach()
        return self.mlp_relevance(inputs).view(*some.shape[:-1], 1)

    def free_space_relevance(
        self, ray_samples: RaySamples, weights: Float[Tensor, "rays samples 1"]
    ) -> Float[Tensor, "rays 1"]:
        """Return the highest relevance in [0, 1] along rays before their first surface; below 0 while it is unknown.

        Args:
            ray_samples: Samples of the rays.
            weights: Rendering weights of the samples.
        """
        return self.relevance_hull(self.to_unit_cube(free_space(ray_samples, weights))).amax(dim=-1, keepdim=True)

    def to_unit_cube(self, positions: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
        """Map world positions to the cube [0, 1]^3 of the backbone's hash grid."""
        if self.spatial_distortion is None:
            return SceneBox.get_normalized_positions(positions, self.aabb)
        return (self.spatial_distortion(positions) + 2) / 4

    def to_world(self, positions: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
        """Invert `to_unit_cube`, for positions within the cube."""
        if self.spatial_distortion is None:
            return self.aabb[0] + positions * (self.aabb[1] - self.aabb[0])
        contracted = positions * 4 - 2
        size = contracted.abs().amax(dim=-1, keepdim=True)  # below 2, which stands for infinity
        return torch.where(size <= 1, contracted, contracted / (size * (2 - size)))

    def get_density(self, ray_samples: RaySamples) -> tuple[Float[Tensor, "*bs 1"], Float[Tensor, "*bs features"]]:
        """Return density and geometry features of samples, as nerfacto computes them, but without gradients with respect to
        their positions: these serve normals, which are not supported, and double the backward pass of the encodings."""
        positions, inside = self._grid_positions(ray_samples.frustums.get_positions())
        base = self.mlp_base(positions.view(-1, 3)).view(*positions.shape[:-1], -1)
        before_activation, features = base.split([1, self.geo_feat_dim], dim=-1)
        density = self.average_init_density * trunc_exp(before_activation.to(positions))
        return density * inside, features

    def _grid_positions(
        self, positions: Float[Tensor, "*bs 3"]
    ) -> tuple[Float[Tensor, "*bs 3"], Bool[Tensor, "*bs 1"]]:
        """Return positions in the hash grid, zero outside of it, and which lie inside."""
        grid = self.to_unit_cube(positions)
        inside = ((grid > 0) & (grid < 1)).all(dim=-1, keepdim=True)
        return grid * inside, inside

    def get_outputs(
        self, ray_samples: RaySamples, density_embedding: Optional[Tensor] = None
    ) -> dict[FieldHeadNames, Tensor]:
        """Return radiance at samples, from their geometry features; `get_relevance` returns relevance."""
        assert density_embedding is not None and ray_samples.camera_indices is not None
        shape = ray_samples.frustums.directions.shape[:-1]
        directions = get_normalized_directions(ray_samples.frustums.directions)
        inputs = [self.direction_encoding(directions.view(-1, 3)), density_embedding.view(-1, self.geo_feat_dim)]
        if self.embedding_appearance is not None:
            appearance = self._appearance(ray_samples.camera_indices.squeeze(-1), self.embedding_appearance)
            inputs.append(appearance.expand(*shape, -1).reshape(-1, self.appearance_embedding_dim))
        rgb = self.mlp_head(torch.cat(inputs, dim=-1)).view(*shape, -1).to(directions)
        return {FieldHeadNames.RGB: rgb}

    def _appearance(self, camera_indices: Tensor, embedding: nn.Module) -> Tensor:
        if self.training:
            return embedding(camera_indices)
        if self.appearance_index is not None:
            return embedding(torch.full((1,), self.appearance_index, device=camera_indices.device))
        if self.use_average_appearance_embedding:
            return embedding.mean(dim=0)  # type: ignore
        return torch.zeros(self.appearance_embedding_dim, device=camera_indices.device)
