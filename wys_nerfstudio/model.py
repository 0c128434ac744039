"""Nerfacto with a relevance head: rendering, losses of the three phases, extra outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.field_components.spatial_distortions import SceneContraction
from nerfstudio.fields.density_fields import HashMLPDensityField
from nerfstudio.model_components.losses import MSELoss, interlevel_loss, scale_gradients_by_distance_squared
from nerfstudio.model_components.ray_samplers import ProposalNetworkSampler, UniformSampler
from nerfstudio.model_components.renderers import AccumulationRenderer, DepthRenderer, RGBRenderer
from nerfstudio.model_components.scene_colliders import NearFarCollider
from nerfstudio.models.base_model import Model
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.utils import colormaps
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from wys_nerfstudio.evaluation.lpips import Lpips, lpips_is_cached
from wys_nerfstudio.field import RelevanceInput, WysField
from wys_nerfstudio.relevance import expectile_loss
from wys_nerfstudio.training.distributed import broadcast_parameters
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.training.validation import minimum, validate_ranges, validate_share
from wys_nerfstudio.utils.cameras import resize_cameras
from wys_nerfstudio.utils.encodings import use_fast_encodings
from wys_nerfstudio.utils.errors import WysError

RAYS_PER_CHUNK = {"tcnn": 1 << 15, "torch": 1 << 13}
"""Rays that are rendered at a time, by backend: about 1.7 GB with torch encodings."""
RELEVANCE_RAYS = 4
"""In the edit phase one ray in this many trains the relevance head, which has converged before."""

MINIMA = {
    **minimum(1, "hidden_dim", "hidden_dim_color", "num_levels", "base_res", "max_res", "log2_hashmap_size"),
    **minimum(1, "features_per_level", "num_nerf_samples_per_ray", "num_proposal_iterations"),
    **minimum(
        0, "eval_num_rays_per_chunk", "near_plane", "relevance_loss_mult", "lpips_loss_mult", "interlevel_loss_mult"
    ),
    **minimum(0, "distortion_loss_mult", "appearance_embed_dim", "average_init_density", "proposal_update_every"),
    **minimum(0, "proposal_warmup", "proposal_weights_anneal_max_num_iters"),
}
"""Smallest allowed values of options."""


@dataclass
class WysModelConfig(NerfactoModelConfig):
    """Options of the model: nerfacto's, and those of editing."""

    _target: type = field(default_factory=lambda: WysModel)
    eval_num_rays_per_chunk: int = 0
    """Rays that are rendered at a time. 0 is 32,768 with tiny-cuda-nn and 8,192 without."""
    background_color: Literal["random", "last_sample", "black", "white"] = "last_sample"
    """Color behind the scene and behind transparent pixels of captured views, as in nerfacto. Edits, and the metrics of edits,
    see transparent pixels in white with white and in black with all others."""
    relevance_input: RelevanceInput = "geometry+position"
    """Input of the relevance head: the backbone's geometry features, these and an encoding of the position, or the hash
    grid's own features (torch backend only)."""
    relevance_loss_mult: float = 1.0
    """Weight of the relevance loss, which trains the relevance head only."""
    relevance_expectile: float = 0.75
    """Expectile of the relevance loss: the share of views that must agree for a relevance of 0.5; 0.5 is their mean."""
    lpips_loss_mult: float = 1.0
    """Weight of the perceptual loss on edited views; 0 trains without it, and without its 233 MB of weights."""
    lpips_weights: Optional[Path] = None
    """File with torchvision's AlexNet weights. Default: torch's cache, else a download."""

    def rays_per_chunk(self) -> int:
        """Return the rays that are rendered at a time."""
        return self.eval_num_rays_per_chunk or RAYS_PER_CHUNK[self.implementation]

    def check(self) -> None:
        """Refuse options that cannot work.

        Raises:
            WysError: For the first such option.
        """
        validate_ranges("pipeline.model.", self, MINIMA)
        validate_share("--pipeline.model.relevance-expectile", self.relevance_expectile, exclusive=True)
        if not self.near_plane < self.far_plane:
            raise WysError(
                f"--pipeline.model.near-plane {self.near_plane} must be below --pipeline.model.far-plane {self.far_plane}."
            )
        samples, passes = self.num_proposal_samples_per_ray, self.num_proposal_iterations
        if len(samples) < passes or not all(count >= 1 for count in samples):
            raise WysError(
                f"--pipeline.model.num-proposal-samples-per-ray needs {passes} numbers, one per proposal network, of at "
                f"least 1, not {' '.join(map(str, samples))}."
            )
        if self.relevance_input == "hashgrid" and self.implementation == "tcnn":
            raise WysError(
                "--pipeline.model.relevance-input hashgrid is not available with tiny-cuda-nn: add "
                "--pipeline.model.implementation torch, or leave it out."
            )
        if self.predict_normals:
            raise WysError("--pipeline.model.predict-normals is not supported: leave it out, in the base run too.")


class WysModel(NerfactoModel):
    """Nerfacto with a dual-head field."""

    config: WysModelConfig
    field: WysField

    def populate_modules(self) -> None:
        """Build field, proposal networks, samplers and renderers as nerfacto does, but not LPIPS: only the edit phase and
        metrics need it, and nerfacto would download its weights even to render."""
        Model.populate_modules(self)
        config = self.config
        config.eval_num_rays_per_chunk = config.rays_per_chunk()
        contraction = None if config.disable_scene_contraction else SceneContraction(order=float("inf"))
        self.field = WysField(
            self.scene_box.aabb,
            num_images=self.num_train_data,
            relevance_input=config.relevance_input,
            hidden_dim=config.hidden_dim,
            num_levels=config.num_levels,
            max_res=config.max_res,
            base_res=config.base_res,
            features_per_level=config.features_per_level,
            log2_hashmap_size=config.log2_hashmap_size,
            hidden_dim_color=config.hidden_dim_color,
            hidden_dim_transient=config.hidden_dim_transient,
            spatial_distortion=contraction,
            use_average_appearance_embedding=config.use_average_appearance_embedding,
            appearance_embedding_dim=config.appearance_embed_dim if config.use_appearance_embedding else 0,
            average_init_density=config.average_init_density,
            implementation=config.implementation,
        )
        self.camera_optimizer = config.camera_optimizer.setup(num_cameras=self.num_train_data, device="cpu")
        self._build_proposals(contraction)
        use_fast_encodings(self)
        # nerfstudio's own collider renders from 0 in eval mode, through space that no training ray has passed.
        self.collider = NearFarCollider(config.near_plane, config.far_plane, reset_near_plane=False)

        self.renderer_rgb = RGBRenderer(background_color=config.background_color)
        self.renderer_accumulation = AccumulationRenderer()
        self.renderer_depth = DepthRenderer(method="median")
        self.renderer_expected_depth = DepthRenderer(method="expected")
        self.rgb_loss = MSELoss()

        from torchmetrics.functional import structural_similarity_index_measure
        from torchmetrics.image import PeakSignalNoiseRatio

        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = structural_similarity_index_measure
        self._lpips: list[Lpips] = []  # a list hides it from state_dict and parameters

        self.step = 0
        self.phase = Phase.EDIT
        """Phase of the run, set by the edit session. A finished run stays in the last one."""
        self._colors_only = False
        """Whether eval outputs are colors alone; see `colors_only`."""
        self.proposals_pretrained = False
        """Whether the proposal networks come from a base run, so that their annealing is over from the start."""
        self.set_edit_mask(mask_threshold=0.5, localized=True)

    def set_edit_mask(self, mask_threshold: float, localized: bool) -> None:
        """Set what the outputs `relevance` and `edit_mask` show.

        Args:
            mask_threshold: Pixels of at least this relevance are in the mask.
            localized: Whether edits are confined; if not, relevance is 1 everywhere.
        """
        self.mask_threshold, self.localized = mask_threshold, localized

    def _build_proposals(self, contraction: Optional[SceneContraction]) -> None:
        config = self.config
        count = 1 if config.use_same_proposal_network else config.num_proposal_iterations
        self.proposal_networks = torch.nn.ModuleList()
        for i in range(count):
            arguments: dict[str, Any] = config.proposal_net_args_list[min(i, len(config.proposal_net_args_list) - 1)]
            self.proposal_networks.append(
                HashMLPDensityField(
                    self.scene_box.aabb,
                    spatial_distortion=contraction,
                    **arguments,
                    average_init_density=config.average_init_density,
                    implementation=config.implementation,
                )
            )
        networks = [self.proposal_networks[min(i, count - 1)] for i in range(config.num_proposal_iterations)]
        self.density_fns = [network.density_fn for network in networks]

        def steps_between_updates(step: int) -> float:
            return max(1.0, config.proposal_update_every * min(1.0, step / max(1, config.proposal_warmup)))

        uniform = config.proposal_initial_sampler == "uniform"
        self.proposal_sampler = ProposalNetworkSampler(
            num_nerf_samples_per_ray=config.num_nerf_samples_per_ray,
            num_proposal_samples_per_ray=config.num_proposal_samples_per_ray,
            num_proposal_network_iterations=config.num_proposal_iterations,
            single_jitter=config.use_single_jitter,
            update_sched=steps_between_updates,
            initial_sampler=UniformSampler(single_jitter=config.use_single_jitter) if uniform else None,
        )

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """Return nerfacto's groups, and one for the relevance head."""
        groups: dict[str, list[Parameter]] = {
            "proposal_networks": list(self.proposal_networks.parameters()),
            "fields": self.field.scene_parameters(),
            "relevance": self.field.relevance_parameters(),
        }
        self.camera_optimizer.get_param_groups(param_groups=groups)
        return groups

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Return nerfacto's callbacks for the proposal networks, past their warmup if they are pretrained."""
        callbacks = super().get_training_callbacks(training_callback_attributes)
        if self.proposals_pretrained:
            ahead = max(self.config.proposal_weights_anneal_max_num_iters, self.config.proposal_warmup)
            for callback in callbacks:
                callback.func = partial(_call_ahead, callback.func, ahead)
        return callbacks

    def training_state(self) -> dict[str, Any]:
        """Return the state that is no weight: counters of the proposal sampler, which place samples early in training."""
        sampler = self.proposal_sampler
        return {
            "anneal": float(sampler._anneal),
            "steps_since_update": sampler._steps_since_update,
            "step": sampler._step,
            "proposals_pretrained": self.proposals_pretrained,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `training_state`."""
        self.proposal_sampler.set_anneal(state["anneal"])
        self.proposal_sampler._steps_since_update = int(state["steps_since_update"])
        self.proposal_sampler._step = int(state["step"])
        self.proposals_pretrained = state["proposals_pretrained"]

    # ------------------------------------------------------------------------------------------------- rendering

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        """Render rays: `rgb`, `accumulation`, `relevance` in [0, 1] (in the edit phase of every `RELEVANCE_RAYS`-th ray), and in
        eval mode nerfacto's depths and `relevance_overlay`, without the mask's border, for point clouds. Free-space relevance
        is part of it in eval mode only: the head is trained on surfaces.

        In the localize phase the scene is fixed, and `relevance` is the only output.
        """
        localizing = self.training and self.phase is Phase.LOCALIZE
        # Edited views must not move cameras.
        posing = self.training and self.phase is Phase.RECONSTRUCT
        with torch.set_grad_enabled(posing and torch.is_grad_enabled()):
            if self.training:
                self.camera_optimizer.apply_to_raybundle(ray_bundle)
        steps_since_update = self.proposal_sampler._steps_since_update
        with torch.set_grad_enabled(torch.is_grad_enabled() and not localizing):
            samples, weights_list, samples_list = self.proposal_sampler(ray_bundle, density_fns=self.density_fns)
            density, features = self.field.get_density(samples)
        if not self.training:  # evaluation must not advance the counter that schedules proposal updates
            self.proposal_sampler._steps_since_update = steps_since_update
        if localizing:
            relevance = self.field.get_relevance(samples, features)
            return {"relevance": self._composite(relevance, samples.get_weights(density).detach())}

        field_outputs: dict[Any, Tensor] = {
            **self.field.get_outputs(samples, features),
            FieldHeadNames.DENSITY: density,
        }
        if self.config.use_gradient_scaling:
            field_outputs = scale_gradients_by_distance_squared(field_outputs, samples)
        weights = samples.get_weights(field_outputs[FieldHeadNames.DENSITY])
        weights_list.append(weights)
        samples_list.append(samples)

        rgb = self.renderer_rgb(rgb=field_outputs[FieldHeadNames.RGB], weights=weights)
        if self._colors_only:
            return {"rgb": rgb}
        outputs: dict[str, Any] = {"rgb": rgb, "accumulation": self.renderer_accumulation(weights=weights)}
        if not (self.training and self.phase is Phase.RECONSTRUCT):
            # Detached: the relevance loss must not change the geometry.
            every = RELEVANCE_RAYS if self.training else 1
            relevance = self.field.get_relevance(samples, features, every)
            outputs["relevance"] = self._composite(relevance, weights[::every].detach())
        if self.training:
            outputs["weights_list"] = weights_list
            outputs["ray_samples_list"] = samples_list
        else:
            outputs["depth"] = self.renderer_depth(weights=weights, ray_samples=samples)
            outputs["expected_depth"] = self.renderer_expected_depth(weights=weights, ray_samples=samples)
            for i in range(self.config.num_proposal_iterations):
                outputs[f"prop_depth_{i}"] = self.renderer_depth(weights=weights_list[i], ray_samples=samples_list[i])
            combined = torch.maximum(outputs["relevance"], self.field.free_space_relevance(samples, weights))
            if self.phase is Phase.RECONSTRUCT:  # nothing has trained the relevance head
                combined = torch.zeros_like(combined)
            outputs["relevance"] = combined if self.localized else torch.ones_like(combined)
            outputs["relevance_overlay"] = self._overlay(outputs["rgb"], outputs["relevance"])
        return outputs

    def _composite(self, values: Float[Tensor, "n s 1"], weights: Float[Tensor, "n s 1"]) -> Float[Tensor, "n 1"]:
        """Composite relevance along rays like color, without nerfstudio's override of the background color."""
        if self.config.background_color == "last_sample":
            rest = (1 - weights[:, :-1].sum(dim=1, keepdim=True)).clamp_min(0)
            weights = torch.cat([weights[:, :-1], rest], dim=1)
        return (weights * values).sum(dim=1)

    def _overlay(self, rgb: Float[Tensor, "*bs 3"], relevance: Float[Tensor, "*bs 1"]) -> Float[Tensor, "*bs 3"]:
        colors = colormaps.apply_float_colormap(relevance.clamp(0, 1), "inferno").to(rgb)
        return torch.where(relevance >= self.mask_threshold, 0.5 * rgb + 0.5 * colors, 0.4 * rgb)

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> dict[str, Tensor]:
        """Render an image: nerfacto's outputs, and

        - `relevance_value` (height, width, 1) in [0, 1];
        - `relevance` (height, width, 3), the same as colors of a fixed scale: nerfstudio's viewer normalizes single-channel
          outputs in every frame;
        - `edit_mask` (height, width, 3), white where relevance is at least `mask_threshold`, else black;
        - `relevance_overlay` (height, width, 3), the render tinted within the mask, dimmed outside, with a white border.
        """
        outputs = super().get_outputs_for_camera_ray_bundle(camera_ray_bundle)
        if self._colors_only:
            return outputs
        relevance, rgb = outputs["relevance"], outputs["rgb"]
        colors = colormaps.apply_float_colormap(relevance.clamp(0, 1), "inferno").to(rgb)
        mask = relevance >= self.mask_threshold
        outside = (~mask).float().permute(2, 0, 1)
        border = mask & (F.max_pool2d(outside, kernel_size=3, stride=1, padding=1).permute(1, 2, 0) > 0)
        return {
            **outputs,
            "relevance": colors,
            "relevance_value": relevance,
            "relevance_overlay": torch.where(border, torch.ones_like(rgb), outputs["relevance_overlay"]),
            "edit_mask": mask.float().expand(-1, -1, 3),
        }

    @contextmanager
    def eval_as_view(self, view: int) -> Iterator[None]:
        """Context manager: eval mode with the appearance of one training view."""
        was_training = self.training
        self.eval()
        self.field.appearance_index = view
        try:
            yield
        finally:
            self.field.appearance_index = None
            self.train(was_training)

    @torch.no_grad()
    def render_view(self, cameras: Cameras, view: int, size: Optional[tuple[int, int]] = None) -> dict[str, Tensor]:
        """Render a training view with its learned pose correction and its own appearance, without jitter.

        Args:
            cameras: The training cameras.
            view: Index of the view among them.
            size: Height and width of the render in pixels, for the camera's field of view; by default the camera's.

        Returns:
            Every eval output, each (height, width, channels).
        """
        with self.eval_as_view(view):
            camera = self.pose_corrected_camera(cameras, view)
            if size is not None:
                resize_cameras(camera, size[1], size[0])
            return self.get_outputs_for_camera(camera)

    @contextmanager
    def colors_only(self) -> Iterator[None]:
        """Context manager: eval outputs are `rgb` alone, which takes three quarters of the time."""
        self._colors_only = True
        try:
            yield
        finally:
            self._colors_only = False

    def render_colors(self, cameras: Cameras, view: int) -> Float[Tensor, "h w 3"]:
        """Render the colors of a training view in [0, 1], as `render_view` does.

        Args:
            cameras: The training cameras.
            view: Index of the view among them.
        """
        with self.colors_only():
            return self.render_view(cameras, view)["rgb"].clamp(0, 1)

    @torch.no_grad()
    def render_pixels(
        self, cameras: Cameras, view: int, where: Bool[Tensor, "h w"]
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Render pixels of a training view, as `render_view` does.

        Args:
            cameras: The training cameras.
            view: Index of the view among them.
            where: Pixels to render. Its shape is the size of the render, for the camera's field of view.

        Returns:
            Colours, relevance and depth (along the rays, median) of these pixels, row by row.
        """
        with self.eval_as_view(view):
            camera = self.pose_corrected_camera(cameras, view)
            resize_cameras(camera, where.shape[1], where.shape[0])
            coords = camera.get_image_coords().to(camera.device)[where.to(camera.device)]
            if not len(coords):
                return coords.new_zeros(0, 3), coords.new_zeros(0), coords.new_zeros(0)
            rays = camera.generate_rays(camera_indices=0, coords=coords)
            outputs = super().get_outputs_for_camera_ray_bundle(rays[:, None])  # one column of pixels
        return outputs["rgb"][:, 0], outputs["relevance"][:, 0, 0], outputs["depth"][:, 0, 0]

    def pose_corrected_camera(self, cameras: Cameras, view: int) -> Cameras:
        """Return one of the training cameras with its learned pose correction."""
        camera = cameras[view : view + 1].to(self.device)
        camera.metadata = {"cam_idx": view}
        camera.camera_to_worlds = self.camera_optimizer.apply_to_camera(camera)
        return camera

    def needs_visual_hull(self) -> bool:
        """Return whether free-space relevance of the current instruction is still unknown."""
        return not self.field.relevance_hull.known

    @torch.no_grad()
    def build_visual_hull(
        self,
        cameras: Cameras,
        maps: Float[Tensor, "b mh mw"],
        unclamped_maps: Float[Tensor, "b uh uw"],
        depths: Float[Tensor, "b lh lw"],
        given_masks: bool = False,
    ) -> None:
        """Compute free-space relevance from the maps of all views (see `relevance.visual_hull`).

        Args:
            cameras: The training cameras.
            maps: Relevance maps in [0, 1], of any size.
            unclamped_maps: The same maps before outliers were clamped, of any size.
            depths: Depth along the rays of a grid over each view.
            given_masks: The maps are given masks, which replace the relevance head.
        """
        if given_masks:
            self.field.zero_relevance()
        corrected = cameras.to(self.device)
        poses = [self.pose_corrected_camera(cameras, view).camera_to_worlds for view in range(len(cameras))]
        corrected.camera_to_worlds = torch.cat(poses)
        self.field.relevance_hull.build(self.field.to_world, corrected, maps, unclamped_maps, depths, given_masks)

    def reset_relevance(self) -> None:
        """Collective: reset relevance head and free-space relevance, for another instruction."""
        self.field.reset_relevance()
        broadcast_parameters(self.field)

    # ---------------------------------------------------------------------------------------------------- losses

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """Return metrics of a batch of rays; none in the localize phase."""
        return super().get_metrics_dict(outputs, batch) if "rgb" in outputs else {}

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: Optional[dict[str, Any]] = None
    ) -> dict[str, Tensor]:
        """Return the weighted losses of the current phase.

        Reconstruct: nerfacto's losses. Localize: the relevance loss. Edit: L1 and LPIPS on the edited views (as
        Instruct-NeRF2NeRF), nerfacto's regularizers and the relevance loss.
        """
        if not self.training or self.phase is Phase.RECONSTRUCT:
            return super().get_loss_dict(outputs, batch, metrics_dict)
        losses: dict[str, Tensor] = {}
        if "relevance" in batch:
            every = 1 if self.phase is Phase.LOCALIZE else RELEVANCE_RAYS
            target = batch["relevance"][::every].to(self.device)
            loss = expectile_loss(outputs["relevance"], target, self.config.relevance_expectile)
            losses["relevance_loss"] = self.config.relevance_loss_mult * loss
        if self.phase is Phase.LOCALIZE:
            return losses
        assert metrics_dict is not None
        # Opaque, also where nerfacto's background is random: edited views are.
        target, rgb = self.renderer_rgb.blend_background(batch["image"].to(self.device)), outputs["rgb"]
        losses["rgb_loss"] = F.l1_loss(rgb, target)
        if self.config.lpips_loss_mult > 0:
            size = batch["patch_size"]
            patches, targets = (x.view(-1, size, size, 3).permute(0, 3, 1, 2) for x in (rgb, target))
            distance = self.perceptual_distance()(patches.clamp(0, 1), targets)
            losses["lpips_loss"] = self.config.lpips_loss_mult * distance
        losses["interlevel_loss"] = self.config.interlevel_loss_mult * interlevel_loss(
            outputs["weights_list"], outputs["ray_samples_list"]
        )
        losses["distortion_loss"] = self.config.distortion_loss_mult * metrics_dict["distortion"]
        return losses

    def perceptual_distance(self) -> Lpips:
        """Return LPIPS, loading it on first use. Not a property: nerfstudio's viewer reads every property."""
        if not self._lpips:
            self._lpips.append(Lpips(self.config.lpips_weights).to(self.device))
        return self._lpips[0]

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return PSNR, SSIM and, if its weights are available, LPIPS against an image; images for the writers."""
        truth = self.renderer_rgb.blend_background(batch["image"].to(self.device))
        rgb = outputs["rgb"]
        first, second = (x.permute(2, 0, 1)[None] for x in (truth, rgb))
        metrics = {"psnr": float(self.psnr(first, second)), "ssim": float(self.ssim(first, second))}  # type: ignore
        if self._lpips or lpips_is_cached(self.config.lpips_weights):
            metrics["lpips"] = float(self.perceptual_distance()(first, second))
        images = {
            "img": torch.cat([truth, rgb], dim=1),
            "depth": colormaps.apply_depth_colormap(outputs["depth"], accumulation=outputs["accumulation"]),
            "relevance": outputs["relevance"],
            "relevance_overlay": outputs["relevance_overlay"],
        }
        return metrics, images


def _call_ahead(func: Callable[..., None], ahead: int, step: int) -> None:
    func(step=step + ahead)
