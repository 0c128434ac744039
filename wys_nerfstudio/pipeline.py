"""The pipeline: knows all parts, says what happens at each step. No diffusion inside.

A run goes through three phases (see `schedule`). Everything happens in one callback before each training step, outside
autocast and without an autograd graph in memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, get_args

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.editing import Editor, load_editor
from wys_nerfstudio.evaluation import evaluate
from wys_nerfstudio.evaluation.ground_truth import GroundTruth
from wys_nerfstudio.evaluation.lpips import MIN_LPIPS_PATCH, lpips_is_cached
from wys_nerfstudio.evaluation.niqe import NiqeParams, check_niqe
from wys_nerfstudio.model import WysModel
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, model_state, read_checkpoint, run_folder
from wys_nerfstudio.training.devices import same_device
from wys_nerfstudio.training.distributed import broadcast_parameters, gather, main_process_only, wrap_ddp
from wys_nerfstudio.training.edit_loop import EditLoop
from wys_nerfstudio.training.history import History
from wys_nerfstudio.training.lr_warmup import apply_lr_warmup
from wys_nerfstudio.training.options import Localization, WysOptions
from wys_nerfstudio.training.run_setup import copy_resumed_files, start_run
from wys_nerfstudio.training.run_state import STATE_KEY, RunState, random_state
from wys_nerfstudio.training.schedule import Phase, PhaseSchedule
from wys_nerfstudio.utils.atomic_io import write_tensors
from wys_nerfstudio.utils.data_checks import read_masks
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.viewer.panel import ViewerPanel


@dataclass
class WysPipelineConfig(WysOptions):
    """Options of the edit."""

    _target: type = field(default_factory=lambda: WysPipeline)


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
        super().__init__(config, device, test_mode, 1, local_rank, grad_scaler)  # type: ignore
        self.world_size = world_size
        if world_size > 1:
            # nerfstudio's own wrapping works on CUDA devices only.
            self._model: Any = wrap_ddp(self.model)
        self.plan = config.plan()
        overlap = not same_device(self.editor_device, self.model.device)
        self.edit_loop = EditLoop(config, self.scene_model, self.datamanager, self.editor, overlap)
        """Edits the views; knows how many edits there were."""
        self.history = History(Path())
        """What was applied to the scene; of the run's folder once the run has begun."""
        self.resumed: Optional[RunState] = None
        """State of the run that is resumed; the trainer sets it."""
        self.report: Callable[[str], None] = lambda text: None
        """Told what long work has come to."""
        self._lr_warmup_start = 0
        self._editor: Optional[Editor] = None
        self._phase: Optional[Phase] = None
        self._masks: Optional[Tensor] = None
        self._optimizers: Optional[Optimizers] = None
        self._folder = Path()
        self._set_threshold(config.mask_threshold)
        self.scene_model.localized = config.localization != "none"
        self.controls = ViewerPanel(
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
        self.scene_model.proposals_pretrained = self.config.base_run is not None
        if self.resumed is not None:
            self._resume(self.resumed)
        else:
            self.history = start_run(self.config, self._folder, self.scene_model, self.datamanager)
        callbacks = super().get_training_callbacks(training_callback_attributes)
        return [TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self._before_step), *callbacks]

    def _check_what_editing_needs(self) -> None:
        """Loads editor and LPIPS once, so that nothing turns out to be missing half an hour later."""
        config = self.config
        self.editor().encode_text(config.instruction)
        if config.model.lpips_loss_mult > 0:
            self.scene_model.perceptual_distance()
            sampler = self.datamanager.train_pixel_sampler
            self.datamanager.use_edit_rays(in_patches=True)
            self.datamanager.train_pixel_sampler = sampler
        if config.niqe_params is not None:
            check_niqe(config.niqe_params, *self.datamanager.view_size)
        if config.masks_dir is not None:
            pictures = self.datamanager.train_dataset.image_filenames
            self._masks = read_masks(config.masks_dir, pictures, *self.datamanager.view_size)
        if self.plan.reconstruct_steps > 0 and torch.device(self.editor_device).type == "cuda":
            # Reconstruction should have the GPU's memory to itself; loading again takes seconds.
            self._editor = None
            torch.cuda.empty_cache()

    def _resume(self, state: RunState) -> None:
        """Goes on with a run, in its own folder or in another."""
        assert self.config.resume_from is not None
        copy_resumed_files(state, run_folder(self.config.resume_from) / "wys", self._folder)
        self.history = History(self._folder, state.history)
        self.datamanager.set_state(state.views)
        self.edit_loop.set_state(state.edits, state.pending)
        self._lr_warmup_start = state.lr_warmup_start
        self.scene_model.proposals_pretrained = state.proposals_pretrained
        self.scene_model.set_sampler_state(state.sampler)
        CONSOLE.print(f"Resuming at step {state.step + 1} with {len(self.datamanager.edited_views)} edited views.")

    @property
    def editor_device(self) -> str:
        """Device of the editor."""
        return self.config.editor_device or str(self.model.device)

    def editor(self) -> Editor:
        """The editor, loaded on first use. No property: the viewer evaluates every property of every module."""
        if self._editor is None:
            config = self.config
            self._editor = load_editor(
                config.editor, self.editor_device, config.editor_dtype, config.editor_allow_pickle
            )
        return self._editor

    # -------------------------------------------------------------------------------------------------- each step

    def _before_step(self, step: int) -> None:
        phase = self.plan.phase(step)
        if phase is not self._phase:
            self.enter_phase(phase)
        if phase is not Phase.EDIT:
            return
        assert self._optimizers is not None
        apply_lr_warmup(self._optimizers, step - self._lr_warmup_start)
        if self.plan.edits_due(step, self.config.edit_every) and not self.edit_loop.paused:
            self.edit_loop.edit(step, self._folder)

    @property
    def phase(self) -> Optional[Phase]:
        """The phase that the run is in; None before its first step, and right after an instruction was applied."""
        return self._phase

    def enter_phase(self, phase: Phase) -> None:
        """Makes everything ready for a phase; relevance maps are made or found here. The caller holds the train lock."""
        CONSOLE.print(f"Phase: {phase.value}.")
        if phase is not Phase.RECONSTRUCT:
            self._prepare_relevance()
        if phase is Phase.EDIT:
            self.edit_loop.carve_hull()
            self.datamanager.use_edit_rays(in_patches=self.config.model.lpips_loss_mult > 0)
            self._keep_captured_scene()
            self._lr_warmup_start = max(self._lr_warmup_start, self.plan.edit_start)
        else:
            self.datamanager.use_reconstruction_rays()
        self._phase = phase
        self.scene_model.phase = phase

    @property
    def has_captured_scene(self) -> bool:
        """Whether there is a captured scene to return to."""
        return (self._folder / CAPTURED_SCENE).is_file()

    @main_process_only
    def _keep_captured_scene(self) -> None:
        """Keeps the scene as it is before the first edit, as a checkpoint that --base-run takes."""
        if not self.has_captured_scene:
            write_tensors(self._folder / CAPTURED_SCENE, {"step": self.plan.edit_start - 1, "pipeline": self.weights()})

    def _prepare_relevance(self) -> None:
        config = self.config
        if self.datamanager.relevance_state is not None or not self.scene_model.localized:
            return
        if self._masks is not None:
            self.datamanager.set_relevance(self._masks.float())
            return
        self.datamanager.make_relevance_maps(
            self.editor(),
            config.relevance_request(config.instruction, self.datamanager.reference_hash()),
            config.relevance_normalization,
            config.relevance_outlier_factor,
            self._folder / "relevance",
            config.relevance_batch_size,
            self._maps_made,
        )

    def _maps_made(self, done: int, total: int) -> None:
        self.report(f"relevance map {done} of {total}")
        # Maps do not touch the scene, and all of them take long: the viewer may draw in between.
        self._train_lock.release()
        time.sleep(0.02)
        self._train_lock.acquire()

    # ------------------------------------------------------------------------------------- other instructions, and back

    def update_setting(self, name: str, value: Any) -> None:
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

    def weights(self) -> dict[str, Tensor]:
        """The pipeline's state, named the same for any number of ranks."""
        return {name.replace("_model.module.", "_model.", 1): value for name, value in self.state_dict().items()}

    def run_state(self, step: int) -> RunState:
        """What resuming needs beside weights and optimizers. All ranks must come here.

        Args:
            step: The step that has just been trained.
        """
        return RunState(
            step=step,
            plan=self.plan,
            edits=self.edit_loop.edits,
            pending=[vars(edit) for edit in self.edit_loop.pending()],
            settings={"instruction": self.config.instruction, **self.config.live_settings()},
            cli_settings=self.config.cli_settings,
            views=self.datamanager.state(),
            history=self.history.data(),
            sampler=self.scene_model.sampler_state(),
            lr_warmup_start=self._lr_warmup_start,
            proposals_pretrained=self.scene_model.proposals_pretrained,
            random=gather(random_state()),
        )

    def snapshot(self, step: int) -> dict[str, Any]:
        """The run as of now for `restore`: a checkpoint without optimizers, but with the relevance maps. All ranks must come
        here.

        Args:
            step: The step that has just been trained.
        """
        state = {"step": step, "pipeline": self.weights(), STATE_KEY: self.run_state(step).data()}
        return {**state, "relevance": self.datamanager.relevance_state}

    def restore(self, snapshot: dict[str, Any], step: int) -> None:
        """Returns to a snapshot; what was left of its plan then is what is left now.

        Args:
            snapshot: As of `snapshot`.
            step: The step that has just been trained.
        """
        state = RunState.of(snapshot, self._folder)
        self.scene_model.load_state_dict(model_state(snapshot))
        self.scene_model.set_sampler_state(state.sampler)
        self.datamanager.set_state(state.views)
        plan = state.plan
        self.plan = PhaseSchedule(plan.reconstruct_steps + step - state.step, plan.localize_steps, plan.edit_steps)
        self.edit_loop.set_state(state.edits, state.pending)
        for name, value in state.settings.items():
            setattr(self.config, name, value)
        self.scene_model.mask_threshold = self.config.mask_threshold
        self.scene_model.localized = self.config.localization != "none"
        self.datamanager.forget_relevance()
        if snapshot.get("relevance") is not None:
            self.datamanager.set_relevance(*snapshot["relevance"])
        else:
            self._prepare_relevance()
        self._start_over(step)

    def reset(self, step: int) -> None:
        """Returns to the captured scene and the captured views; nothing is left to do.

        Args:
            step: The step that has just been trained.
        """
        self.scene_model.load_state_dict(model_state(read_checkpoint(self._folder / CAPTURED_SCENE)))
        self.datamanager.start_from_captured()
        self.edit_loop.set_state(self.edit_loop.edits, made=[])
        self._start_over(step)

    def apply(self, instruction: str, on_top: bool, step: int) -> None:
        """Begins anew with another instruction: relevance maps, relevance head, edits.

        Args:
            instruction: What to change.
            on_top: Start from the scene and the views as they are now, not as they were captured.
            step: The step that has just been trained.
        """
        if on_top:
            self.edit_loop.commit(step + 1, self._folder)
            self.datamanager.start_from_current()
        else:
            self.reset(step)
        config = self.config
        config.instruction = instruction
        self.datamanager.forget_relevance()
        self.scene_model.field.reset_relevance()
        broadcast_parameters(self.scene_model.field)
        self.scene_model.localized = config.localization != "none"
        localize = config.localize_steps if self.scene_model.localized else 0
        self.plan = PhaseSchedule(step + 1, localize, config.edit_steps)
        self._start_over(step)

    def _start_over(self, step: int) -> None:
        assert self._optimizers is not None
        for optimizer in self._optimizers.optimizers.values():
            optimizer.state.clear()
        self._lr_warmup_start = step + 1
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
        if self.test_mode != "val":
            self.eval()
            edit_metrics = self.evaluate_edit()
            views = evaluate.per_view(edit_metrics, self.datamanager.view_names)
            results["edit"] = {"mean": evaluate.means(edit_metrics), "views": views}
        return results

    @torch.no_grad()
    def evaluate_edit(self) -> evaluate.Metrics:
        """Render the training views and compute the metrics of the edit. Requires eval mode."""
        config, data, model = self.config, self.datamanager, self.scene_model
        all_views = range(data.num_views)
        cameras = data.train_dataset.cameras
        captured = data.captured_views(all_views).cpu()
        edited = torch.stack([model.render_view(cameras, view)["rgb"].clamp(0, 1).cpu() for view in all_views])
        perceptual = None
        if lpips_is_cached(config.model.lpips_weights) and min(data.view_size) >= MIN_LPIPS_PATCH:
            perceptual = model.perceptual_distance().cpu()
        return evaluate.evaluate_edit(
            captured,
            edited,
            [path.name for path in data.train_dataset.image_filenames],
            perceptual,
            NiqeParams.read(config.niqe_params) if config.niqe_params is not None else None,
            GroundTruth.find(data.get_datapath(), config.instruction),
            (config.caption_before, config.caption_after) if config.caption_after else None,
            config.clip_model,
        )

    # ------------------------------------------------------------------------------------------- the run's folder

    def write_pictures(self) -> None:
        """Writes edited views and history as they are now, for people: what is read again is in the checkpoint."""
        self.datamanager.write_edited_views(self._folder / "edits")
        self.history.write()

    def finish(self, step: int) -> None:
        """Puts the last edits in place and writes the contact sheet. All ranks must come here.

        Args:
            step: The step that has just been trained.
        """
        self.edit_loop.commit(step + 1, self._folder)
        # The viewer draws from other threads, and a training view is rendered in that view's own appearance.
        with self._train_lock:
            self.edit_loop.write_contact_sheet(self._folder)
