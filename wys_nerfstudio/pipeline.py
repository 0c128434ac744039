"""The pipeline: connects data manager, model, editor and edit session to nerfstudio's trainer.

A run has three phases (see `training.schedule`). Edits happen in one callback before each training step, outside autocast and
without an autograd graph in memory.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import torch
import tyro
from jaxtyping import Bool, Float
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from wys_nerfstudio import relevance
from wys_nerfstudio.datamanager import WysDataManager, WysDataManagerConfig
from wys_nerfstudio.editing import EditOptions, Editor, EditSettings, load_editor
from wys_nerfstudio.editing.compilation import check_compiler, compile_editor
from wys_nerfstudio.editing.edit import check_supported
from wys_nerfstudio.editing.editor import EditorProfile
from wys_nerfstudio.editing.loading import Precision, load_profile, resolve_dtype
from wys_nerfstudio.evaluation import evaluate
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.lpips import MIN_LPIPS_PATCH, lpips_is_cached
from wys_nerfstudio.evaluation.niqe import NiqeParams, check_niqe
from wys_nerfstudio.export.data_set import edit_records, write_data_set
from wys_nerfstudio.model import WysModel, WysModelConfig
from wys_nerfstudio.relevance.cache import RelevanceRequest
from wys_nerfstudio.relevance.localizer import Localization, available_localizations, trains_field
from wys_nerfstudio.training.checkpoint import model_state
from wys_nerfstudio.training.devices import has_own_device, validate_editor_device
from wys_nerfstudio.training.distributed import wrap_ddp
from wys_nerfstudio.training.interrupts import exit_on_error
from wys_nerfstudio.training.run_state import RunState
from wys_nerfstudio.training.scene_checks import SavedScene
from wys_nerfstudio.training.schedule import PhaseSchedule
from wys_nerfstudio.training.session import RELEVANCE_FOLDER, EditSession, Run
from wys_nerfstudio.training.settings import RunSettings, Settings
from wys_nerfstudio.training.validation import flag, minimum, validate_ranges, validate_share
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import convert_memory_errors
from wys_nerfstudio.utils.view_masks import read_masks
from wys_nerfstudio.viewer.panel import ViewerPanel

MINIMA = {
    **minimum(1, "edit_every", "edit_count", "edit_steps", "relevance_batch_size", "history_size"),
    **minimum(0, "reconstruct_steps", "localize_steps"),
}
"""Smallest allowed values of options."""


@dataclass
class WysPipelineConfig(VanillaPipelineConfig):
    """Options of scene, data and edit."""

    _target: type = field(default_factory=lambda: WysPipeline)
    datamanager: WysDataManagerConfig = field(default_factory=WysDataManagerConfig)
    """Options of the training views."""
    model: WysModelConfig = field(default_factory=WysModelConfig)
    """Options of the scene's model."""

    instruction: Annotated[str, tyro.conf.arg(aliases=["--instruction"])] = ""
    """What to change, in words: "Turn the bear into a panda"."""
    base_run: Annotated[Optional[Path], tyro.conf.arg(aliases=["--base-run"])] = None
    """Folder or config.yml of a nerfacto or wys run whose scene is edited; without it the scene is reconstructed first."""

    editor: Annotated[str, tyro.conf.arg(aliases=["--editor"])] = "timbrooks/instruct-pix2pix"
    """InstructPix2Pix, FLUX.2 klein or Qwen-Image-Edit: a hub id, a local folder in diffusers format, or "embedded" or
    "embedded-flow", the small editors of toy images that come with the package."""
    editor_device: Optional[str] = None
    """Device of the editor, such as cuda:1, on which no process trains; it edits while training continues. Default: the
    training device."""
    editor_dtype: Precision = "auto"
    """Precision of the editor's weights and edits; auto is float16 (FLUX.2 and Qwen: bfloat16) on a GPU and float32 on the
    CPU. Relevance maps are computed in float32."""
    compile_editor: bool = False
    """Compile the editor's network with torch.compile in the first edits, which takes minutes; needs a C++ compiler (on a GPU,
    a C compiler and triton). `wys check --compile-editor` measures whether it pays. Relevance maps are not compiled."""
    editor_allow_pickle: bool = False
    """Load .bin files of an editor without safetensors files, with torch's weights-only loader."""
    relevance_batch_size: Optional[int] = None
    """Views per pass of the editor for relevance maps. Default: the editor's own (8 for InstructPix2Pix, 1 for FLUX.2)."""
    edit_resolution: Optional[int] = None
    """Longer side in pixels at which views are edited. Default: the editor's own (512 for InstructPix2Pix; for FLUX.2 that
    of the views, up to one megapixel; for Qwen-Image-Edit one megapixel)."""

    localization: Annotated[Localization, tyro.conf.arg(aliases=["--localization"])] = "relevance-field"
    """What confines the edits: renders of the relevance field, the views' own relevance maps, a folder of masks, or
    nothing (which is Instruct-NeRF2NeRF)."""
    mask_threshold: Annotated[float, tyro.conf.arg(aliases=["--mask-threshold"])] = 0.5
    """Pixels of at least this relevance are edited (tau); 0 edits everything, higher is more local."""
    masks_dir: Optional[Path] = None
    """Folder with one mask per view, for --localization masks; white pixels are edited. Masks are named as the views, with
    their sub-folders if names repeat, or as the masks that a run writes."""
    relevance_noise_level: Optional[float] = None
    """Noise level of relevance maps (t_rel), as a share of the diffusion. Default: the editor's own (0.8 for
    InstructPix2Pix)."""
    relevance_num_samples: int = 1
    """Noise samples averaged in a relevance map; more reduce its noise and take proportionally longer."""
    relevance_normalization: Literal["view", "scene"] = "view"
    """Normalize relevance to [0, 1] in each view, or over all views of the scene."""
    relevance_outlier_factor: float = relevance.OUTLIER_FACTOR
    """Relevance is clamped at Q3 + this many interquartile ranges; a larger factor suits editors with clean maps."""

    guidance_scale: Annotated[Optional[float], tyro.conf.arg(aliases=["--guidance-scale"])] = None
    """How strongly edits follow the instruction (S_T). Default: the editor's own (7.5 for InstructPix2Pix)."""
    image_guidance_scale: Annotated[Optional[float], tyro.conf.arg(aliases=["--image-guidance-scale"])] = None
    """How strongly edits keep to the captured view (S_I). Default: the editor's own (1.5 for InstructPix2Pix)."""
    solver_order: Optional[Literal[1, 2]] = None
    """Sampler of edits: 1 is DDIM (of flow matching, Euler), 2 is DPM-Solver++(2M), which needs fewer steps. Default: the
    editor's own (2 for InstructPix2Pix)."""
    diffusion_steps: Optional[int] = None
    """Diffusion steps of an edit from pure noise; an edit from less noise takes proportionally fewer. Default: the
    editor's own (8 for InstructPix2Pix)."""
    min_strength: float = 0.02
    """Minimum noise that an edit starts from, as a share of the diffusion."""
    max_strength: float = 0.98
    """Maximum noise that an edit starts from, as a share of the diffusion."""

    reconstruct_steps: int = 30000
    """Steps of plain reconstruction; 0 with a base run."""
    localize_steps: int = 500
    """Steps in which only the relevance head is trained."""
    edit_steps: int = 4000
    """Steps of training on edited views."""
    edit_every: int = 10
    """Steps from one edit to the next."""
    edit_count: int = 1
    """Views that are edited together."""
    clip_model: Optional[str] = "openai/clip-vit-base-patch32"
    """CLIP for ns-eval's metrics of the edit: a hub id, a local folder, or "embedded" for the toy world's own; None omits
    them."""
    niqe_params: Optional[Path] = None
    """modelparameters.mat of NIQE's authors, for ns-eval's NIQE of the edited views; it is omitted without."""
    caption_before: str = ""
    """What the captured scene shows, such as "a stone bear in a garden"; for ns-eval."""
    caption_after: str = ""
    """What the edited scene shows, such as "a panda in a garden"; for ns-eval."""
    seed: int = 0
    """Seed of the edits: order of views, noise and noise strengths."""
    history_size: int = 5
    """Number of times that Undo can return; each takes a file of 0.1 GB, and 0.5 GB more for 200 edited views of 512x384."""

    def schedule(self, resumed: Optional[RunState] = None) -> PhaseSchedule:
        """Return the phases of a run with these options.

        Args:
            resumed: State of the run that is resumed; it may have applied other instructions.
        """
        if resumed is not None:
            phases, localize_steps = resumed.schedule, resumed.schedule.localize_steps
            if self.localization == "masks":  # only those steps that were trained before masks were given
                localize_steps = min(max(0, resumed.step + 1 - phases.reconstruct_steps), localize_steps)
            return PhaseSchedule(phases.reconstruct_steps, localize_steps, self.edit_steps)
        localize_steps = self.localize_steps if trains_field(self.localization) else 0
        return PhaseSchedule(
            0 if self.base_run is not None else self.reconstruct_steps, localize_steps, self.edit_steps
        )

    def edit_options(self, settings: RunSettings) -> EditOptions:
        """Return guidance, steps and resolution of an edit, as far as they are given."""
        return EditOptions(
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            diffusion_steps=self.diffusion_steps,
            solver_order=self.solver_order,
            resolution=self.edit_resolution,
            mask_threshold=settings.mask_threshold,
            relevance_noise_level=self.relevance_noise_level,
            relevance_num_samples=self.relevance_num_samples,
            relevance_outlier_factor=self.relevance_outlier_factor,
        )

    def edit_settings(self, settings: RunSettings, profile: EditorProfile) -> EditSettings:
        """Return guidance, steps and resolution of an edit with an editor."""
        return self.edit_options(settings).resolve(profile.of_scenes)

    def relevance_request(self, editor: Editor, instruction: str, reference: str) -> RelevanceRequest:
        """Return what the relevance maps of an instruction depend on.

        Args:
            editor: The editor.
            instruction: What to change.
            reference: Result of `WysDataManager.reference_hash`.
        """
        level = self.relevance_noise_level
        return RelevanceRequest(
            editor=self.editor,
            dtype=resolve_dtype(self.editor_dtype, editor.device, editor.profile),
            instruction=instruction,
            noise_level=editor.profile.of_scenes.relevance_noise_level if level is None else level,
            num_samples=self.relevance_num_samples,
            seed=self.seed,
            resolution=self.edit_resolution,
            reference=reference,
        )

    def preview_map(self, editor: Editor, views: WysDataManager, view: int, instruction: str) -> Float[Tensor, "h w"]:
        """Return the relevance map of one view for any instruction.

        Args:
            editor: The editor.
            views: The training views.
            view: Index of the view.
            instruction: What to change.
        """
        request = self.relevance_request(editor, instruction, views.reference_hash())
        return views.compute_relevance_map(editor, view, request, self.relevance_outlier_factor)

    def check(self, settings: RunSettings) -> None:
        """Refuse options that cannot work, before anything is built.

        Args:
            settings: Settings that the run starts with, which may be those of a resumed run.

        Raises:
            WysError: For the first such option.
        """
        if not settings.instruction.strip():
            raise WysError(
                'There is no instruction: say what to change, as in --instruction "Turn the bear into a panda".'
            )
        self.edit_options(settings).check(lambda name: flag("edit_resolution" if name == "resolution" else name))
        for name in ("min_strength", "max_strength"):
            validate_share(flag(name), getattr(self, name), exclusive=True)
        if self.min_strength > self.max_strength:
            raise WysError(
                f"{flag('min_strength')} {self.min_strength} is above {flag('max_strength')} {self.max_strength}: swap "
                "them."
            )
        validate_ranges("pipeline.", self, MINIMA)
        self.datamanager.check()
        self.model.check()
        validate_editor_device(self.editor_device)
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


class WysPipeline(VanillaPipeline):
    """Reconstructs, localizes and edits one scene.

    Args:
        config: Options.
        device: Training device.
        test_mode: "val" trains; in all other modes the editor is never loaded.
        world_size: Number of processes.
        local_rank: Number of this process.
        grad_scaler: The trainer's gradient scaler.
    """

    config: WysPipelineConfig
    datamanager: WysDataManager

    def __init__(
        self,
        config: WysPipelineConfig,
        device: "str | torch.device",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Optional[GradScaler] = None,
    ) -> None:
        with exit_on_error():  # in ns-eval and other commands nothing else converts errors about the data
            super().__init__(config, device, test_mode, 1, local_rank, grad_scaler)  # type: ignore
        if config.model.background_color == "white":
            self.datamanager.background = 1.0
        self.world_size = world_size
        if world_size > 1:
            # nerfstudio's own wrapping works on CUDA devices only.
            self._model: Any = wrap_ddp(self.model)
        with exit_on_error():
            self._profile = load_profile(config.editor) if test_mode == "val" else None
        self.settings = Settings(
            self._typed_settings(), available_localizations(config.masks_dir is not None), self._check_guidance
        )
        """Options that can change during the run; the config keeps what was typed."""
        self.session = EditSession(
            config,
            self.settings,
            self.scene_model,
            self.datamanager,
            self.editor,
            self.weights,
            self._make_relevance_maps,
            config.schedule(),
            overlap=has_own_device(config.editor_device, device, world_size),
        )
        """The edits of the run."""
        self.report: Callable[[str], None] = lambda text: None
        """Receives the progress of long work."""
        self.resumed: Optional[tuple[RunState, Path]] = None
        """State and checkpoint of the run that is resumed."""
        self._editor: Optional[Editor] = None
        self._masks: Optional[Tensor] = None
        self.panel = ViewerPanel(self.settings, live=test_mode == "val")

    @property
    def scene_model(self) -> WysModel:
        """The model without the wrapper of distributed training."""
        return self.model  # type: ignore

    def _typed_settings(self) -> RunSettings:
        return RunSettings.from_options(self.config, self._profile and self._profile.of_scenes)

    def _check_guidance(self, values: RunSettings) -> None:
        if self._profile is not None:
            self._profile.check_guidance(self.config.editor, values.guidance_scale, values.image_guidance_scale)

    # ------------------------------------------------------------------------------------------------------- start

    def resume(self, state: RunState, checkpoint: Path) -> None:
        """Continue a run from its checkpoint, whose weights are loaded.

        Args:
            state: State in the checkpoint.
            checkpoint: File of the checkpoint.
        """
        typed = self._typed_settings()
        self.settings.load(state.resumed_settings(typed))
        self.session.cli_settings = state.resumed_cli_settings(typed)
        self.session.schedule = self.config.schedule(state)
        self.scene_model.load_training_state(state.scene)
        self.resumed = (state, checkpoint)

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Start the run, first of all what can fail, and return the callbacks of its steps."""
        trainer, optimizers = training_callback_attributes.trainer, training_callback_attributes.optimizers
        assert trainer is not None and optimizers is not None
        self._check_requirements()
        run = Run(trainer.base_dir / "wys", optimizers, use_patches=self.config.model.lpips_loss_mult > 0)
        if self.resumed is not None:
            self.session.resume(run, *self.resumed)
        else:
            self.scene_model.proposals_pretrained = self.config.base_run is not None
            outputs = self.datamanager.train_dataparser_outputs
            transform = {"transform": outputs.dataparser_transform.tolist(), "scale": outputs.dataparser_scale}
            self.session.start(run, transform)
        callbacks = super().get_training_callbacks(training_callback_attributes)
        before_step = TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self.session.before_step)
        return [before_step, *callbacks]

    def _check_requirements(self) -> None:
        """Load editor and LPIPS once, so that nothing turns out to be missing half an hour later."""
        config, data = self.config, self.datamanager
        settings = self.settings.current
        self._check_guidance(settings)
        if config.compile_editor:
            check_compiler(self.editor_device)
            CONSOLE.print("The first edit compiles the editor, which can take minutes.")
        editor = self.editor()
        check_supported(editor, [settings.instruction], config.edit_settings(settings, editor.profile))
        if config.model.lpips_loss_mult > 0:
            self.scene_model.perceptual_distance()
            data.check_patches()
        if config.niqe_params is not None:
            check_niqe(config.niqe_params, *data.view_size)
        if config.masks_dir is not None:
            files = data.train_dataset.image_filenames
            self._masks = read_masks(config.masks_dir, files, data.view_names, *data.view_size)
        if self.session.schedule.reconstruct_steps > 0 and torch.device(self.editor_device).type == "cuda":
            # Reconstruction should have the GPU's memory to itself; loading again takes seconds.
            self.release_editor()
            torch.cuda.empty_cache()

    @property
    def editor_device(self) -> str:
        """Device of the editor."""
        return self.config.editor_device or str(self.model.device)

    def editor(self) -> Editor:
        """Return the editor, loading it on first use. Not a property: nerfstudio's viewer reads every property."""
        if self._editor is None:
            config = self.config
            self._editor = load_editor(
                config.editor, self.editor_device, config.editor_dtype, config.editor_allow_pickle
            )
            if config.compile_editor:
                compile_editor(self._editor, cuda_graphs=not self.session.edit_loop.overlap)
        return self._editor

    def release_editor(self) -> None:
        """Free the editor's memory; `editor` loads it again."""
        self._editor = None
        gc.collect()  # the first load in a process leaves the networks in reference cycles

    def _make_relevance_maps(self, folder: Path) -> None:
        """Compute or find the relevance maps of all views; given masks replace them.

        Args:
            folder: The run's `wys` folder.
        """
        config, data = self.config, self.datamanager
        if self._masks is not None:
            data.set_relevance(self._masks)
            return
        editor = self.editor()
        data.make_relevance_maps(
            editor,
            config.relevance_request(editor, self.settings.current.instruction, data.reference_hash()),
            config.relevance_normalization,
            config.relevance_outlier_factor,
            folder / RELEVANCE_FOLDER,
            config.relevance_batch_size or editor.profile.relevance_batch_size,
            lambda done, total: self.report(f"relevance map {done} of {total}"),
        )

    # --------------------------------------------------------------------------------------------------- checkpoints

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Load a checkpoint's weights. Those of another backend or shape end the program with a sentence."""
        with exit_on_error():
            weights = model_state({"pipeline": loaded_state})
            saved = SavedScene("The run", weights, {}, "Restore the config.yml that it was trained with.")
            saved.check(self.scene_model, {*weights, *self.scene_model.state_dict()})
            super().load_pipeline(loaded_state, step)

    def weights(self) -> dict[str, Any]:
        """Return the pipeline's state with the same names for any number of processes; a tensor with two names is one object."""
        detached: dict[int, Tensor] = {}
        state = {}
        for name, value in self.state_dict(keep_vars=True).items():
            kept = detached.setdefault(id(value), value.detach()) if isinstance(value, Tensor) else value
            state[name.replace("_model.module.", "_model.", 1)] = kept
        return state

    def get_extra_state(self) -> dict[str, Any]:
        """Return what renders and evaluation need beside weights; part of the pipeline's state (`SETTINGS_KEY`)."""
        return {"settings": self.settings.current.as_dict(), "localized": self.session.localized}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `get_extra_state`."""
        self.settings.load(RunSettings(**state["settings"]))
        self.session.localized = state["localized"]

    def export(self, folder: Path) -> str:
        """Write the training views as they are now as a data set, as `wys export` does, and return what was written, in words."""
        edits = edit_records(self.session.history.entries, self.settings.current, self.config.editor)
        return write_data_set(folder, self.datamanager, self.scene_model, edits, report=self.report)

    # ---------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> dict[str, Any]:
        """Return nerfstudio's metrics of the held-out views, if there are any; for ns-eval also `edit`, the metrics of the
        training views.

        `edit` holds `mean` and `views`: the metrics of `evaluation.evaluate` as means and per view (those of neighboring
        views under the first one's name).
        """
        if self.test_mode == "val":
            return super().get_average_eval_image_metrics(step, output_path, get_std)

        def remedy() -> str:
            chunk = self.config.model.eval_num_rays_per_chunk
            return (
                "end other programs that use its memory, or lower eval_num_rays_per_chunk in the run's config.yml "
                f"to {max(1, chunk // 2)}."
            )

        with exit_on_error(), convert_memory_errors("while views were evaluated", remedy):
            held_out = len(self.datamanager.eval_dataset)
            results: dict[str, Any] = {}
            if held_out:  # one view has no standard deviation
                results = super().get_average_eval_image_metrics(step, output_path, get_std and held_out > 1)
            self.eval()
            metrics = self.evaluate_edit()
            views = evaluate.per_view(metrics, self.datamanager.view_names)
            results["edit"] = {"mean": evaluate.means(metrics), "views": views}
        return results

    @torch.no_grad()
    def evaluate_edit(
        self,
        edited: Optional[Iterable[Float[Tensor, "h w 3"]]] = None,
        masks: Optional[Bool[Tensor, "n h w"]] = None,
    ) -> evaluate.Metrics:
        """Return the metrics of the edit on the training views. Requires eval mode.

        Args:
            edited: Each view after the edit, in [0, 1]; by default this scene is rendered.
            masks: As in `evaluation.evaluate_edit`.
        """
        config, data, model = self.config, self.datamanager, self.scene_model
        with_lpips = lpips_is_cached(config.model.lpips_weights) and min(data.view_size) >= MIN_LPIPS_PATCH
        views = range(data.num_views)
        edited = edited or (model.render_colors(data.cameras, view) for view in views)
        return evaluate.evaluate_edit(
            zip((data.captured_views([view])[0] for view in views), edited),
            [path.name for path in data.train_dataset.image_filenames],
            model.perceptual_distance() if with_lpips else None,
            NiqeParams.read(config.niqe_params) if config.niqe_params is not None else None,
            GroundTruth.find(data.get_datapath(), self.settings.current.instruction),
            (config.caption_before, config.caption_after) if config.caption_after else None,
            config.clip_model,
            masks,
        )
