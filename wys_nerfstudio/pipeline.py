"""The pipeline: knows all parts, says what happens at each step, renders views for editing. No diffusion inside.

A run goes through three phases (see `schedule`). Everything happens in one callback before each training step, outside
autocast and without an autograd graph in memory.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, get_args

import torch
import tyro
from jaxtyping import Bool, Float
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from wys_nerfstudio import evaluation, relevance, schedule
from wys_nerfstudio.checkpoint import (
    CAPTURED_SCENE,
    RunState,
    edit_records,
    load_base,
    model_state,
    read_checkpoint,
)
from wys_nerfstudio.clip import load_clip
from wys_nerfstudio.controls import LIVE_SETTINGS, Controls
from wys_nerfstudio.datamanager import REFERENCE_VIEWS, RelevanceRequest, WysDataManager, WysDataManagerConfig
from wys_nerfstudio.editing import Editor, EditSettings, load_editor
from wys_nerfstudio.errors import WysError
from wys_nerfstudio.history import HISTORY_FILE, SNAPSHOTS
from wys_nerfstudio.model import WysModel, WysModelConfig
from wys_nerfstudio.perceptual import SMALLEST_LPIPS_PATCH, lpips_is_cached
from wys_nerfstudio.pictures import contact_sheet, heat, spread, write_png
from wys_nerfstudio.schedule import Phase, Plan
from wys_nerfstudio.truth import Truth

WARM_UP_STEPS = 50
"""Steps over which learning rates rise when editing begins."""

Localization = Literal["relevance-field", "relevance-map", "masks", "none"]


@dataclass
class WysPipelineConfig(VanillaPipelineConfig):
    """Options of the edit."""

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
    """InstructPix2Pix-type checkpoint: a hub id, a local folder in diffusers format, or "embedded" for the small editor of
    toy pictures that comes with the package."""
    editor_device: Optional[str] = None
    """Device of the editor, such as cuda:1; by default the training device."""
    editor_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the editor; auto is bfloat16 (or float16) on a GPU and float32 on the CPU."""
    editor_batch_size: int = 8
    """Views per pass of the editor while relevance maps are made."""
    edit_long_side: Optional[int] = None
    """Longer side in pixels at which views are edited; by default the editor's own (512 for InstructPix2Pix)."""

    localization: Annotated[Localization, tyro.conf.arg(aliases=["--localization"])] = "relevance-field"
    """What confines the edits: renders of the relevance field, the views' own relevance maps, a folder of masks, or
    nothing (which is Instruct-NeRF2NeRF)."""
    mask_threshold: Annotated[float, tyro.conf.arg(aliases=["--mask-threshold"])] = 0.5
    """Pixels of at least this relevance are edited (tau); 0 edits everything, higher is more local."""
    mask_growth: int = 1
    """How far the field's mask spreads into what the view's own relevance map adds to it, in cells of the editor's
    latents; lets an edit grow where there is only air yet, such as a hat."""
    masks_dir: Optional[Path] = None
    """Folder with one mask per view, named as the view, for --localization masks; bright is edited."""
    relevance_noise_level: float = 0.8
    """Noise level at which the editor is asked what is relevant (t_rel), as a share of the diffusion."""
    relevance_draws: int = 1
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
    min_noise_level: float = 0.02
    """Least noise that an edit starts from, as a share of the diffusion."""
    max_noise_level: float = 0.98
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
    clip: Optional[str] = "openai/clip-vit-base-patch32"
    """CLIP that ns-eval asks about the edit: a hub id or a local folder; None leaves its measures out."""
    caption_before: str = ""
    """What the captured scene shows, such as "a stone bear in a garden"; for ns-eval."""
    caption_after: str = ""
    """What the edited scene shows, such as "a panda in a garden"; for ns-eval."""
    seed: int = 0
    """Seed of everything that the editor draws; order of views, noise and noise levels."""

    resume_from: tyro.conf.Suppress[Optional[Path]] = None
    """Folder of the run that --load-dir resumes; set by the trainer's options."""
    asked: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """Instruction and live settings as they were typed; they can change while the run goes on."""

    def plan(self) -> Plan:
        """The phases that these options ask for."""
        localize = 0 if self.localization == "none" else self.localize_steps
        return Plan(0 if self.base_run is not None else self.reconstruct_steps, localize, self.edit_steps)

    def live_settings(self) -> dict[str, Any]:
        """Present values of what can be changed while the run goes on."""
        return {name: getattr(self, name) for name in LIVE_SETTINGS}

    def edit_settings(self) -> EditSettings:
        """The part of the options that concerns a single edit."""
        return EditSettings(
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            diffusion_steps=self.diffusion_steps,
            long_side=self.edit_long_side,
        )

    def adopt_resumed_run(self) -> None:
        """Takes over what must be as it was in the run that is resumed."""
        assert self.resume_from is not None
        state = RunState.read(self.resume_from / "wys")
        instruction = state.settings["instruction"]
        if self.instruction not in ("", instruction, state.asked["instruction"]):
            raise WysError(
                f'--load-dir resumes a run whose instruction is "{instruction}": leave out --instruction, or give the '
                "run to --base-run to apply another instruction to its scene."
            )
        self.instruction = instruction
        for name in LIVE_SETTINGS:
            if getattr(self, name) == state.asked[name]:
                setattr(self, name, state.settings[name])
        self.base_run = None
        self.reconstruct_steps, self.localize_steps = state.plan.reconstruct_steps, state.plan.localize_steps

    def check(self) -> None:
        """Refuses options that cannot work, before anything is built.

        Raises:
            WysError: For the first such option.
        """
        if not self.instruction.strip():
            raise WysError(
                'There is no instruction: say what to change, as in --instruction "Turn the bear into a panda".'
            )
        shares = ("mask_threshold", "relevance_noise_level", "min_noise_level", "max_noise_level")
        for name in shares:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise WysError(f"{_flag(name)} must be between 0 and 1, not {value}.")
        if not self.relevance_outlier_factor >= 0:
            raise WysError(
                f"{_flag('relevance_outlier_factor')} must be at least 0, not {self.relevance_outlier_factor}."
            )
        for name in ("relevance_noise_level", "min_noise_level", "max_noise_level"):
            if not 0 < getattr(self, name) < 1:
                raise WysError(f"{_flag(name)} must be above 0 and below 1, not {getattr(self, name)}.")
        if self.min_noise_level > self.max_noise_level:
            raise WysError(
                f"{_flag('min_noise_level')} {self.min_noise_level} is above {_flag('max_noise_level')} "
                f"{self.max_noise_level}: swap them."
            )
        counts = {"edit_every": 1, "edit_count": 1, "diffusion_steps": 1, "relevance_draws": 1, "editor_batch_size": 1}
        counts |= {"reconstruct_steps": 0, "localize_steps": 0, "edit_steps": 1, "mask_growth": 0}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise WysError(f"{_flag(name)} must be at least {least}, not {getattr(self, name)}.")
        if self.localization == "relevance-field" and self.localize_steps == 0:
            raise WysError("--localization relevance-field needs --pipeline.localize-steps above 0 to train the field.")
        if (self.localization == "masks") != (self.masks_dir is not None):
            raise WysError("--localization masks and --pipeline.masks-dir FOLDER go together: give both or none.")
        if self.model.lpips_loss_mult > 0 and self.datamanager.edit_patch_size < SMALLEST_LPIPS_PATCH:
            raise WysError(
                f"--pipeline.datamanager.edit-patch-size must be at least {SMALLEST_LPIPS_PATCH} for the perceptual loss, not "
                f"{self.datamanager.edit_patch_size}; --pipeline.model.lpips-loss-mult 0 trains without it."
            )
        if bool(self.caption_before) != bool(self.caption_after):
            raise WysError("--pipeline.caption-before and --pipeline.caption-after go together: give both or none.")
        if self.model.predict_normals:
            raise WysError("--pipeline.model.predict-normals is not supported: leave it out, in the base run too.")


def _flag(name: str) -> str:
    short = ("mask_threshold", "guidance_scale", "image_guidance_scale")
    return f"--{'' if name in short else 'pipeline.'}{name.replace('_', '-')}"


class WysPipeline(VanillaPipeline):
    """Reconstructs, localises and edits one scene.

    Args:
        config: Options.
        device: Training device.
        test_mode: "val" is training; in all other modes nothing of the editor is ever touched.
        world_size: Number of processes.
        local_rank: This process's number.
        grad_scaler: The trainer's.
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
        config.datamanager.white_background = config.model.background_color == "white"
        super().__init__(config, device, test_mode, world_size, local_rank, grad_scaler)  # type: ignore
        self.plan = config.plan()
        self.edits = 0
        """Edits begun so far; the next edit's number."""
        self.skipped = 0
        """Edits of this process that were skipped, because their mask was empty."""
        self.seconds_per_edit: Optional[float] = None
        """Mean over the latest edits."""
        self.editing_paused = False
        """Whether no further views are edited for the time being."""
        self.report: Callable[[str], None] = lambda text: None
        """Told what long work has come to."""
        self._warm_from = 0
        self._editor: Optional[Editor] = None
        self._phase: Optional[Phase] = None
        self._masks: Optional[Tensor] = None
        self._optimizers: Optional[Optimizers] = None
        self._folder = Path()
        self.scene_model.mask_threshold = config.mask_threshold
        self.scene_model.localized = config.localization != "none"
        self.controls = Controls(
            config.instruction,
            config.live_settings(),
            [name for name in get_args(Localization) if name != "masks" or config.masks_dir is not None],
            live=test_mode == "val",
            set_threshold=self._set_threshold,
        )

    def _set_threshold(self, value: float) -> None:
        self.scene_model.mask_threshold = value

    @property
    def scene_model(self) -> WysModel:
        """The model, typed, without the wrapper of distributed training."""
        return self.model  # type: ignore

    # ---------------------------------------------------------------------------------------------- start of a run

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """The run's preparations, whatever can fail among them first, and the callbacks of its steps."""
        trainer = training_callback_attributes.trainer
        assert trainer is not None
        self._folder = trainer.base_dir / "wys"
        self._optimizers = training_callback_attributes.optimizers
        self._train_lock = trainer.train_lock
        self._check_what_editing_needs()
        if self.config.resume_from is not None:
            self._resume(trainer._start_step)
        elif self.config.base_run is not None:
            self._take_base(self.config.base_run)
        self.scene_model.warmup_done = self.config.base_run is not None
        callbacks = super().get_training_callbacks(training_callback_attributes)
        before = TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self._before_step)
        after = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], self._after_train)
        return [before, *callbacks, after]

    def _check_what_editing_needs(self) -> None:
        """Loads editor and LPIPS once, so that nothing turns out to be missing half an hour later."""
        config = self.config
        self.editor().encode_text(config.instruction)
        if config.model.lpips_loss_mult > 0:
            self.scene_model.perceptual_distance()
            sampler = self.datamanager.train_pixel_sampler
            self.datamanager.start_editing(in_patches=True)
            self.datamanager.train_pixel_sampler = sampler
        if config.masks_dir is not None:
            self._masks = self.datamanager.read_masks(config.masks_dir)
        if self.plan.reconstruct_steps > 0 and torch.device(self.editor_device).type == "cuda":
            # Reconstruction should have the GPU's memory to itself; loading again takes seconds.
            self._editor = None
            torch.cuda.empty_cache()

    def _take_base(self, base_run: Path) -> None:
        outputs = self.datamanager.train_dataparser_outputs
        transform = {"transform": outputs.dataparser_transform.tolist(), "scale": outputs.dataparser_scale}
        load_base(self.scene_model, base_run, transform)
        CONSOLE.print(f"The scene of {base_run} is edited; it is not reconstructed again.")

    def _resume(self, start_step: int) -> None:
        old = self.config.resume_from
        assert old is not None
        state = RunState.read(old / "wys")
        if state.step + 1 != start_step:
            raise WysError(
                f'The edited views of "{old}" belong to step {state.step} and the checkpoint to step {start_step - 1}: '
                "resume from the run's newest checkpoint, without --load-step."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in ("relevance", "edits", "masks", REFERENCE_VIEWS, SNAPSHOTS):
            if (old / "wys" / name).is_dir() and old / "wys" != self._folder:
                shutil.copytree(old / "wys" / name, self._folder / name, dirs_exist_ok=True)
        for name in (CAPTURED_SCENE, HISTORY_FILE):
            if (old / "wys" / name).is_file() and old / "wys" != self._folder:
                shutil.copy2(old / "wys" / name, self._folder / name)
        records = edit_records(old / "wys", before_step=start_step)
        (self._folder / "edits.jsonl").write_text("".join(f"{line}\n" for line in records), "utf8")
        self.edits = state.edits
        count = self.datamanager.load_edits(self._folder / "edits")
        CONSOLE.print(f"Resuming at step {start_step} with {count} edited views.")

    @property
    def editor_device(self) -> str:
        """Device of the editor."""
        return self.config.editor_device or str(self.model.device)

    def editor(self) -> Editor:
        """The editor, loaded on first use. No property: the viewer evaluates every property of every module."""
        if self._editor is None:
            self._editor = load_editor(self.config.editor, self.editor_device, self.config.editor_dtype)
        return self._editor

    # -------------------------------------------------------------------------------------------------- each step

    def _before_step(self, step: int) -> None:
        phase = self.plan.phase(step)
        if phase is not self._phase:
            self.enter(phase)
        if phase is not Phase.EDIT:
            return
        self._warm_up(step)
        if self.plan.edits_due(step, self.config.edit_every) and not self.editing_paused:
            self._edit(step)

    @property
    def phase(self) -> Optional[Phase]:
        """The phase that the run is in; None before its first step, and right after an instruction was applied."""
        return self._phase

    def enter(self, phase: Phase) -> None:
        """Makes everything ready for a phase; relevance maps are made or found here. The caller holds the train lock."""
        CONSOLE.print(f"Phase: {phase.value}.")
        if phase is not Phase.RECONSTRUCT:
            self._prepare_relevance()
        if phase is Phase.EDIT:
            self.datamanager.start_editing(in_patches=self.config.model.lpips_loss_mult > 0)
            self._keep_captured_scene()
            self._warm_from = max(self._warm_from, self.plan.edit_start)
        else:
            self.datamanager.stop_editing()
        self._phase = phase
        self.scene_model.phase = phase

    def _warm_up(self, step: int) -> None:
        """Starts the scene's optimizers anew and brings their learning rates up slowly.

        Reconstruction's squared error leaves Adam with second moments far too small for the gradients of editing's absolute
        error: at the full rate its first step would throw the scene out of place, with old moments as with new ones.
        """
        assert self._optimizers is not None
        share = (step + 1 - self._warm_from) / WARM_UP_STEPS
        for name in ("fields", "proposal_networks"):
            optimizer = self._optimizers.optimizers[name]
            if step == self._warm_from:
                optimizer.state.clear()
            # A scheduler sets the rate anew after each step, so this one's factor does not pile up.
            if share < 1 and name in self._optimizers.schedulers:
                for group in optimizer.param_groups:
                    group["lr"] *= share

    def _keep_captured_scene(self) -> None:
        """Keeps the scene as it is before the first edit, as a checkpoint that --base-run takes."""
        path = self._folder / CAPTURED_SCENE
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"step": self.plan.edit_start - 1, "pipeline": self.state_dict()}, path)

    def _prepare_relevance(self) -> None:
        config = self.config
        if "relevance" in self.datamanager.cached_batch or not self.scene_model.localized:
            return
        if self._masks is not None:
            self.datamanager.set_relevance(self._masks.float())
            return
        self.datamanager.make_relevance_maps(
            self.editor(),
            self._relevance_request(config.instruction),
            config.relevance_normalization,
            config.relevance_outlier_factor,
            self._folder / "relevance",
            config.editor_batch_size,
            self._maps_made,
        )

    def _maps_made(self, done: int, total: int) -> None:
        self.report(f"relevance map {done} of {total}")
        # Maps do not touch the scene, and all of them take long: the viewer may draw in between.
        self._train_lock.release()
        time.sleep(0.02)
        self._train_lock.acquire()

    def _relevance_request(self, instruction: str) -> RelevanceRequest:
        config = self.config
        return RelevanceRequest(
            editor=config.editor,
            instruction=instruction,
            noise_level=config.relevance_noise_level,
            draws=config.relevance_draws,
            seed=config.seed,
            long_side=config.edit_long_side,
            reference=self.datamanager.reference_digest(),
        )

    @torch.no_grad()
    def _edit(self, step: int) -> None:
        config, data = self.config, self.datamanager
        numbers = range(self.edits, self.edits + config.edit_count)
        views = [schedule.view_of_edit(config.seed, number, data.num_views) for number in numbers]
        t = self._start_timestep(self.edits)
        self.edits += config.edit_count
        began = time.perf_counter()
        renders = [self.scene_model.render_view(data.train_dataset.cameras, view) for view in views]
        masks = self.masks_of(views, renders)
        chosen = [i for i in range(len(views)) if masks[i].any()]
        if chosen:
            data.edit_views(
                self.editor(),
                [views[i] for i in chosen],
                torch.stack([renders[i]["rgb"] for i in chosen]),
                masks[chosen],
                config.instruction,
                config.edit_settings(),
                start_timestep=t,
                seeds=[schedule.edit_seed(config.seed, numbers[i]) for i in chosen],
            )
        steps = len(schedule.timesteps(t, config.diffusion_steps, self.editor().num_train_timesteps))
        seconds = (time.perf_counter() - began) / len(views)
        self.skipped += len(views) - len(chosen)
        if chosen:
            self.seconds_per_edit = 0.8 * (self.seconds_per_edit or seconds) + 0.2 * seconds
        self._record(step, numbers, views, masks, t, steps, seconds)
        self._show(step, views[0], renders[0], masks[0])

    def _start_timestep(self, edit_number: int) -> int:
        config = self.config
        level = schedule.noise_level_of_edit(config.seed, edit_number, config.min_noise_level, config.max_noise_level)
        return max(1, round(level * (self.editor().num_train_timesteps - 1)))

    @torch.no_grad()
    def preview(
        self, view: int, instruction: str
    ) -> tuple[Float[Tensor, "h w 3"], Bool[Tensor, "h w"], Float[Tensor, "h w 3"]]:
        """What the next edit would make of a view: as it was, the mask, edited. Nothing is kept.

        Args:
            view: Which view.
            instruction: What to change. If it is not the run's, the mask comes from a relevance map of this view alone.

        Raises:
            WysError: If nothing in this view is relevant.
        """
        config, data = self.config, self.datamanager
        render = self.scene_model.render_view(data.train_dataset.cameras, view)
        if instruction == config.instruction or config.localization in ("none", "masks"):
            mask = self.masks_of([view], [render])
        else:
            view_map = data.relevance_map(
                self.editor(), view, self._relevance_request(instruction), config.relevance_outlier_factor
            )
            mask = relevance.threshold(view_map[None], config.mask_threshold)
        reference = data.reference_views([view])
        if not mask.any():
            raise WysError(
                f"Nothing in {data.view_names[view]} is relevant at this threshold: lower it, or look elsewhere."
            )
        edited = data.edited(
            self.editor(),
            [view],
            render["rgb"][None],
            mask,
            instruction,
            config.edit_settings(),
            start_timestep=self._start_timestep(self.edits),
            seeds=[schedule.edit_seed(config.seed, self.edits)],
        )
        return reference[0].cpu(), mask[0].cpu(), edited[0].cpu()

    def masks_of(self, views: Sequence[int], renders: Sequence[dict[str, Tensor]]) -> Bool[Tensor, "b h w"]:
        """Where views may be edited, according to the chosen localisation.

        Args:
            views: Which views.
            renders: The model's outputs for them.
        """
        if self.config.localization == "none" or not self.scene_model.localized:
            shape = (len(views), *self.datamanager.view_size)
            return torch.ones(shape, dtype=torch.bool, device=self.model.device)
        maps = torch.stack([self.datamanager.relevance_of(view) for view in views])
        if self.config.localization == "relevance-field":
            field = torch.stack([render["relevance_value"][..., 0] for render in renders])
            tau, height, width = self.config.mask_threshold, *self.datamanager.view_size
            cell = (
                self.editor().latent_factor
                * height
                / self.config.edit_settings().size_for(self.editor(), height, width)[0]
            )
            seen = relevance.threshold(maps.to(field), tau)
            return relevance.grow(relevance.threshold(field, tau), seen, round(self.config.mask_growth * cell))
        # Masks from a folder are 0 or 1 and no matter of a threshold, not even of tau = 0.
        tau = 0.5 if self.config.localization == "masks" else self.config.mask_threshold
        return relevance.threshold(maps, tau)

    # ------------------------------------------------------------------------------------- other instructions, and back

    def change(self, name: str, value: Any) -> None:
        """Changes a live setting.

        Raises:
            WysError: If the value cannot work; the old one stays.
        """
        old = getattr(self.config, name)
        setattr(self.config, name, value)
        try:
            self.config.check()
        except WysError:
            setattr(self.config, name, old)
            raise
        self.scene_model.mask_threshold = self.config.mask_threshold

    def snapshot(self, step: int) -> dict[str, Any]:
        """Everything that `restore` needs, on the CPU; for torch's weights-only loader.

        Args:
            step: The step that has just been trained.
        """
        model = {name: value.detach().cpu().clone() for name, value in self.scene_model.state_dict().items()}
        data = self.datamanager
        relevance_maps = data.cached_batch.get("relevance")
        return {
            "step": step,
            "model": model,
            # No weight, but it decides where samples lie while a scene is young.
            "anneal": self.scene_model.proposal_sampler._anneal,
            "views": data.state(),
            "relevance": None if relevance_maps is None else relevance_maps.detach().cpu().clone(),
            "plan": asdict(self.plan),
            "edits": self.edits,
            "instruction": self.config.instruction,
            "settings": self.config.live_settings(),
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Returns to a snapshot; what was left of its plan then is what is left now.

        Args:
            state: As of `snapshot`.
            step: The step that has just been trained.
        """
        self.scene_model.load_state_dict(state["model"])
        self.scene_model.proposal_sampler.set_anneal(state["anneal"])
        self.datamanager.set_state(state["views"])
        self.datamanager.forget_relevance()
        if state["relevance"] is not None:
            self.datamanager.set_relevance(state["relevance"][..., 0])
        plan = Plan(**state["plan"])
        self.plan = Plan(plan.reconstruct_steps + step - state["step"], plan.localize_steps, plan.edit_steps)
        self.edits = state["edits"]
        self.config.instruction = state["instruction"]
        for name, value in state["settings"].items():
            setattr(self.config, name, value)
        self.scene_model.mask_threshold = self.config.mask_threshold
        self.scene_model.localized = self.config.localization != "none"
        self._start_over(step)

    def reset(self, step: int) -> None:
        """Returns to the captured scene and the captured views; nothing is left to do.

        Args:
            step: The step that has just been trained.
        """
        self.scene_model.load_state_dict(model_state(read_checkpoint(self._folder / CAPTURED_SCENE)))
        self.datamanager.start_from_captured()
        self._start_over(step)

    def apply(self, instruction: str, on_top: bool, step: int) -> None:
        """Begins anew with another instruction: relevance maps, relevance head, edits.

        Args:
            instruction: What to change.
            on_top: Start from the scene and the views as they are now, not as they were captured.
            step: The step that has just been trained.
        """
        if on_top:
            self.datamanager.start_from_current()
        else:
            self.reset(step)
        config = self.config
        config.instruction = instruction
        self.datamanager.forget_relevance()
        self.scene_model.field.reset_relevance()
        self.scene_model.localized = config.localization != "none"
        localize = config.localize_steps if self.scene_model.localized else 0
        self.plan = Plan(step + 1, localize, config.edit_steps)
        self._start_over(step)

    def _start_over(self, step: int) -> None:
        assert self._optimizers is not None
        for optimizer in self._optimizers.optimizers.values():
            optimizer.state.clear()
        self._warm_from = step + 1
        self._phase = None

    # ------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> dict[str, Any]:
        """nerfstudio's figures of the held-out views; for ns-eval also `edit`, what became of the training views.

        `edit` holds `mean` and `views`, the measures of `evaluation` as means and per view (those of neighbours under the
        first view's name).
        """
        results: dict[str, Any] = super().get_average_eval_image_metrics(step, output_path, get_std)
        if self.test_mode == "val":
            return results
        self.eval()
        figures = self._edit_figures()
        views = {
            name: {measure: values[i] for measure, values in figures.items() if i < len(values)}
            for i, name in enumerate(self.datamanager.view_names)
        }
        results["edit"] = {"mean": evaluation.means(figures), "views": views}
        return results

    def _edit_figures(self) -> evaluation.Figures:
        config, data = self.config, self.datamanager
        everything = range(data.num_views)
        captured = data.captured_views(everything).cpu()
        cameras = data.train_dataset.cameras
        renders = [self.scene_model.render_view(cameras, view)["rgb"].clamp(0, 1).cpu() for view in everything]
        edited = torch.stack(renders)
        perceptual = None
        if lpips_is_cached(config.model.lpips_weights) and min(data.view_size) >= SMALLEST_LPIPS_PATCH:
            perceptual = self.scene_model.perceptual_distance().cpu()
        figures = evaluation.edit_figures(captured, edited, perceptual)
        truth = Truth.find(data.get_datapath(), config.instruction)
        captions = (config.caption_before, config.caption_after) if config.caption_after else None
        if truth is not None:
            names = [path.name for path in data.train_dataset.image_filenames]
            figures |= evaluation.truth_figures(truth, names, edited)
            captions = captions or truth.captions
        if config.clip is not None:
            try:
                figures |= evaluation.clip_figures(load_clip(config.clip), captured, edited, captions)
            except WysError as error:
                CONSOLE.print(f"CLIP's measures are left out. {error}", markup=False)
        return figures

    # ------------------------------------------------------------------------------------------- the run's folder

    def _record(
        self,
        step: int,
        numbers: Sequence[int],
        views: Sequence[int],
        masks: Bool[Tensor, "b h w"],
        t: int,
        steps: int,
        seconds: float,
    ) -> None:
        names = self.datamanager.view_names
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "edits.jsonl").open("a", encoding="utf8") as file:
            for number, view, mask in zip(numbers, views, masks):
                share = float(mask.float().mean())
                record = {"edit": number, "step": step, "view": names[view], "t": t, "steps": steps if share else 0}
                record |= {"mask_fraction": round(share, 5), "seconds": round(seconds, 4)}
                file.write(json.dumps(record) + "\n")
        for view, mask in zip(views, masks):
            write_png(self._folder / "masks" / f"{names[view]}.png", mask.float())

    def _show(self, step: int, view: int, render: dict[str, Tensor], mask: Bool[Tensor, "h w"]) -> None:
        """Sends an edit's pictures to TensorBoard and its kin."""
        if not writer.EVENT_WRITERS:
            return
        strip = torch.cat([picture.to("cpu") for picture in self._row(view, render, mask)], dim=1)
        writer.put_image(name="Edit (captured | map | relevance | mask | edited | render)", image=strip, step=step)

    def _row(self, view: int, render: dict[str, Tensor], mask: Bool[Tensor, "h w"]) -> list[Float[Tensor, "h w 3"]]:
        data = self.datamanager
        empty = torch.zeros(data.view_size)
        view_map = data.relevance_of(view) if "relevance" in data.cached_batch else empty
        return [
            data.captured_views([view])[0],
            heat(view_map),
            heat(render["relevance_value"][..., 0]),
            mask.float()[..., None].expand(-1, -1, 3),
            data.current_views([view])[0],
            render["rgb"].clamp(0, 1),
        ]

    def save_run_state(self, step: int) -> None:
        """Writes edited views and state as of a step whose checkpoint has just been written."""
        self.datamanager.save_edits(self._folder / "edits")
        now = {"instruction": self.config.instruction, **self.config.live_settings()}
        RunState(step, self.plan, self.edits, now, self.config.asked).write(self._folder)

    def _after_train(self, step: int) -> None:
        # The viewer draws from other threads, and a training view is rendered in that view's own appearance.
        with self._train_lock:
            self._write_contact_sheet()
        count = len(self.datamanager.edited_views)
        CONSOLE.print(
            f"{count} of {self.datamanager.num_views} views are edited; see {self._folder}/contact_sheet.png."
        )

    @torch.no_grad()
    def _write_contact_sheet(self) -> None:
        titles = ("captured", "relevance map", "relevance field", "mask", "edited view", "render")
        rows: list[tuple[str, list[Tensor]]] = []
        for view in spread(6, self.datamanager.num_views):
            render = self.scene_model.render_view(self.datamanager.train_dataset.cameras, view)
            rows.append(
                (self.datamanager.view_names[view], self._row(view, render, self.masks_of([view], [render])[0]))
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(titles, rows).save(self._folder / "contact_sheet.png")
