"""The options of an edit: what nerfstudio's command line shows, and which values of them cannot work.

The pipeline's parts read them too; that is why they stand below it, in a file of their own.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import torch
import tyro
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig

from wys_nerfstudio import relevance
from wys_nerfstudio.datamanager import WysDataManagerConfig
from wys_nerfstudio.editing import EditSettings
from wys_nerfstudio.evaluation.lpips import MIN_LPIPS_PATCH
from wys_nerfstudio.model import WysModelConfig
from wys_nerfstudio.relevance.cache import RelevanceRequest
from wys_nerfstudio.training.run_state import RunState
from wys_nerfstudio.training.schedule import PhaseSchedule
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.viewer.panel import LIVE_SETTINGS

Localization = Literal["relevance-field", "relevance-map", "masks", "none"]


def _at_least(least: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, least)


# Smallest values of options.
COUNTS = {
    **_at_least(1, "edit_every", "edit_count", "edit_steps"),
    **_at_least(1, "relevance_batch_size"),
    **_at_least(0, "reconstruct_steps", "localize_steps"),
}
DATA_COUNTS = {
    **_at_least(1, "train_num_rays_per_batch", "eval_num_rays_per_batch", "edit_num_rays_per_batch"),
    **_at_least(1, "edit_patch_size", "patch_size"),
}
MODEL_COUNTS = {
    **_at_least(1, "hidden_dim", "hidden_dim_color", "num_levels", "base_res", "max_res", "log2_hashmap_size"),
    **_at_least(
        1, "features_per_level", "num_nerf_samples_per_ray", "num_proposal_iterations", "eval_num_rays_per_chunk"
    ),
    **_at_least(
        0, "near_plane", "relevance_loss_mult", "lpips_loss_mult", "interlevel_loss_mult", "distortion_loss_mult"
    ),
    **_at_least(0, "appearance_embed_dim", "average_init_density", "proposal_update_every", "proposal_warmup"),
    **_at_least(0, "proposal_weights_anneal_max_num_iters"),
}


@dataclass
class WysOptions(VanillaPipelineConfig):
    """Options of scene, data and edit; `WysPipelineConfig` makes them a pipeline's."""

    datamanager: WysDataManagerConfig = field(default_factory=WysDataManagerConfig)
    """Options of the training views."""
    model: WysModelConfig = field(default_factory=WysModelConfig)
    """Options of the scene's model."""

    instruction: Annotated[str, tyro.conf.arg(aliases=["--instruction"])] = ""
    """What to change, in words: "Turn the bear into a panda"."""
    base_run: Annotated[Optional[Path], tyro.conf.arg(aliases=["--base-run"])] = None
    """Folder or config.yml of a nerfacto or wys run whose scene is edited; without it the scene is reconstructed first."""

    editor: Annotated[str, tyro.conf.arg(aliases=["--editor"])] = "timbrooks/instruct-pix2pix"
    """InstructPix2Pix-type checkpoint: a hub id, a local folder in diffusers format, or "embedded" for the small editor of
    toy pictures that comes with the package."""
    editor_device: Optional[str] = None
    """Device of the editor, such as cuda:1, where it works while training goes on; by default the training device."""
    editor_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the editor; auto is bfloat16 (or float16) on a GPU and float32 on the CPU."""
    editor_allow_pickle: bool = False
    """Take an editor's .bin files where it has no safetensors files; torch's weights-only loader reads them."""
    relevance_batch_size: int = 8
    """Views per pass of the editor while relevance maps are made."""
    edit_resolution: Optional[int] = None
    """Longer side in pixels at which views are edited; by default the editor's own (512 for InstructPix2Pix)."""

    localization: Annotated[Localization, tyro.conf.arg(aliases=["--localization"])] = "relevance-field"
    """What confines the edits: renders of the relevance field, the views' own relevance maps, a folder of masks, or
    nothing (which is Instruct-NeRF2NeRF)."""
    mask_threshold: Annotated[float, tyro.conf.arg(aliases=["--mask-threshold"])] = 0.5
    """Pixels of at least this relevance are edited (tau); 0 edits everything, higher is more local."""
    masks_dir: Optional[Path] = None
    """Folder with one mask per view, named as the view, for --localization masks; bright is edited."""
    relevance_noise_level: float = 0.8
    """Noise level at which the editor is asked what is relevant (t_rel), as a share of the diffusion."""
    relevance_num_samples: int = 1
    """Noise draws averaged in a relevance map; more is less noisy and as much slower."""
    relevance_normalization: Literal["view", "scene"] = "view"
    """Stretch relevance to [0, 1] in each view by itself, or over all views of the scene."""
    relevance_outlier_factor: float = relevance.OUTLIER_FACTOR
    """Relevance is clamped at Q3 + this many interquartile ranges; more suits editors whose maps are clean and small."""

    guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--guidance-scale"])] = 7.5
    """How strongly edits follow the instruction (S_T)."""
    image_guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--image-guidance-scale"])] = 1.5
    """How strongly edits keep to the captured view (S_I)."""
    diffusion_steps: int = 20
    """DDIM steps of an edit from pure noise; an edit that starts from less noise takes its share of them."""
    min_strength: float = 0.02
    """Least noise that an edit starts from, as a share of the diffusion."""
    max_strength: float = 0.98
    """Most noise that an edit starts from, as a share of the diffusion."""

    reconstruct_steps: int = 30000
    """Steps of plain reconstruction; none if there is a base run."""
    localize_steps: int = 500
    """Steps in which only the relevance head is trained."""
    edit_steps: int = 4000
    """Steps of training on edited views."""
    edit_every: int = 10
    """Steps from one edit to the next."""
    edit_count: int = 1
    """Views that are edited together."""
    clip_model: Optional[str] = "openai/clip-vit-base-patch32"
    """CLIP that ns-eval asks about the edit: a hub id, a local folder, or "embedded" for the toy world's own; None leaves its
    measures out."""
    niqe_params: Optional[Path] = None
    """modelparameters.mat of NIQE's authors; with it ns-eval measures how natural the edited views look."""
    caption_before: str = ""
    """What the captured scene shows, such as "a stone bear in a garden"; for ns-eval."""
    caption_after: str = ""
    """What the edited scene shows, such as "a panda in a garden"; for ns-eval."""
    seed: int = 0
    """Seed of everything that the editor draws; order of views, noise and noise levels."""

    resume_from: tyro.conf.Suppress[Optional[Path]] = None
    """Checkpoint that --load-dir resumes; set by the trainer's options."""
    resumed_steps: tyro.conf.Suppress[Optional[tuple[int, int]]] = None
    """Steps of reconstruction and of localisation in the resumed run, where instructions may have been applied."""
    cli_settings: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """Instruction and live settings as they were typed; they can change while the run goes on."""

    def plan(self) -> PhaseSchedule:
        """The phases that these options ask for."""
        if self.resumed_steps is not None:
            return PhaseSchedule(*self.resumed_steps, self.edit_steps)
        localize = 0 if self.localization == "none" else self.localize_steps
        return PhaseSchedule(0 if self.base_run is not None else self.reconstruct_steps, localize, self.edit_steps)

    def live_settings(self) -> dict[str, Any]:
        """Present values of what can be changed while the run goes on."""
        return {name: getattr(self, name) for name in LIVE_SETTINGS}

    def edit_settings(self) -> EditSettings:
        """The part of the options that concerns a single edit."""
        return EditSettings(
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            diffusion_steps=self.diffusion_steps,
            resolution=self.edit_resolution,
            mask_threshold=self.mask_threshold,
            relevance_noise_level=self.relevance_noise_level,
            relevance_num_samples=self.relevance_num_samples,
            relevance_outlier_factor=self.relevance_outlier_factor,
        )

    def relevance_request(self, instruction: str, reference: str) -> RelevanceRequest:
        """What the relevance maps of an instruction depend on.

        Args:
            instruction: What to change.
            reference: As of `WysDataManager.reference_hash`.
        """
        return RelevanceRequest(
            editor=self.editor,
            instruction=instruction,
            noise_level=self.relevance_noise_level,
            num_samples=self.relevance_num_samples,
            seed=self.seed,
            resolution=self.edit_resolution,
            reference=reference,
        )

    def adopt_resumed_run(self, checkpoint: Path, state: RunState) -> None:
        """Takes over what must be as it was in the run that is resumed.

        Args:
            checkpoint: Its checkpoint.
            state: The state in it.

        Raises:
            WysError: If another instruction is asked for.
        """
        self.resume_from = checkpoint
        instruction = state.settings["instruction"]
        if self.instruction not in ("", instruction, state.cli_settings["instruction"]):
            raise WysError(
                f'--load-dir resumes a run whose instruction is "{instruction}": leave out --instruction, or give the '
                "run to --base-run to apply another instruction to its scene."
            )
        self.instruction = instruction
        for name in LIVE_SETTINGS:
            if name in state.settings and getattr(self, name) == state.cli_settings[name]:
                setattr(self, name, state.settings[name])
        self.base_run = None
        self.resumed_steps = (state.plan.reconstruct_steps, state.plan.localize_steps)

    def check(self) -> None:
        """Refuses options that cannot work, before anything is built.

        Raises:
            WysError: For the first such option.
        """
        if not self.instruction.strip():
            raise WysError(
                'There is no instruction: say what to change, as in --instruction "Turn the bear into a panda".'
            )
        self.edit_settings().check(lambda name: _flag("edit_resolution" if name == "resolution" else name))
        for name in ("min_strength", "max_strength"):
            if not 0 < getattr(self, name) < 1:
                raise WysError(f"{_flag(name)} must be above 0 and below 1, not {getattr(self, name)}.")
        if self.min_strength > self.max_strength:
            raise WysError(
                f"{_flag('min_strength')} {self.min_strength} is above {_flag('max_strength')} "
                f"{self.max_strength}: swap them."
            )
        validate_ranges("pipeline.", self, COUNTS)
        validate_ranges("pipeline.datamanager.", self.datamanager, DATA_COUNTS)
        validate_ranges("pipeline.model.", self.model, MODEL_COUNTS)
        if not 0 < self.model.relevance_expectile < 1:
            raise WysError(
                f"--pipeline.model.relevance-expectile must be above 0 and below 1, not {self.model.relevance_expectile}."
            )
        if not self.model.near_plane < self.model.far_plane:
            raise WysError(
                f"--pipeline.model.near-plane {self.model.near_plane} must be below --pipeline.model.far-plane "
                f"{self.model.far_plane}."
            )
        samples, passes = self.model.num_proposal_samples_per_ray, self.model.num_proposal_iterations
        if len(samples) < passes or not all(count >= 1 for count in samples):
            raise WysError(
                f"--pipeline.model.num-proposal-samples-per-ray needs {passes} numbers, one per proposal network, of at "
                f"least 1, not {' '.join(map(str, samples))}."
            )
        self._check_editor_device()
        if self.localization == "relevance-field" and self.localize_steps == 0:
            raise WysError("--localization relevance-field needs --pipeline.localize-steps above 0 to train the field.")
        if (self.localization == "masks") != (self.masks_dir is not None):
            raise WysError("--localization masks and --pipeline.masks-dir FOLDER go together: give both or none.")
        if self.model.lpips_loss_mult > 0 and self.datamanager.edit_patch_size < MIN_LPIPS_PATCH:
            raise WysError(
                f"--pipeline.datamanager.edit-patch-size must be at least {MIN_LPIPS_PATCH} for the perceptual loss, not "
                f"{self.datamanager.edit_patch_size}; --pipeline.model.lpips-loss-mult 0 trains without it."
            )
        if bool(self.caption_before) != bool(self.caption_after):
            raise WysError("--pipeline.caption-before and --pipeline.caption-after go together: give both or none.")
        if self.model.predict_normals:
            raise WysError("--pipeline.model.predict-normals is not supported: leave it out, in the base run too.")

    def _check_editor_device(self) -> None:
        if self.editor_device is None:
            return
        try:
            device = torch.device(self.editor_device)
            there = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
        except RuntimeError:
            there = False
        if not there:
            raise WysError(
                f'There is no device "{self.editor_device}" here: --pipeline.editor-device can be cpu, or cuda:0 and so on '
                f"where there is a GPU ({torch.cuda.device_count()} here)."
            )


SHORT = ("mask_threshold", "guidance_scale", "image_guidance_scale")
"""Options that are typed without `pipeline.` in front."""


def _flag(name: str, prefix: str = "pipeline.") -> str:
    return f"--{'' if prefix == 'pipeline.' and name in SHORT else prefix}{name.replace('_', '-')}"


def validate_ranges(prefix: str, options: Any, least: dict[str, int]) -> None:
    """Refuses numbers that are too small, and infinite ones and those that are none.

    Args:
        prefix: What is typed in front of the options, such as "pipeline.".
        options: A dataclass of options.
        least: Smallest value of those that have one.

    Raises:
        WysError: For the first such option.
    """
    for option in fields(options):
        value, bound = getattr(options, option.name), least.get(option.name)
        if not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise WysError(f"{_flag(option.name, prefix)} must be a finite number, not {value}.")
        if bound is not None and value < bound:
            raise WysError(f"{_flag(option.name, prefix)} must be at least {bound}, not {value}.")
