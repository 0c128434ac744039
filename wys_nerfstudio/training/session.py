"""The edits of one run: enters phases; applies, undoes and resets instructions; saves and restores the run's state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol, runtime_checkable

from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.editing import Editor
from wys_nerfstudio.relevance.localizer import trains_field
from wys_nerfstudio.training.checkpoint import CAPTURED_SCENE, model_state, read_checkpoint, run_folder
from wys_nerfstudio.training.distributed import gather, main_process_only
from wys_nerfstudio.training.edit_loop import EditLoop
from wys_nerfstudio.training.history import History
from wys_nerfstudio.training.lr_warmup import apply_lr_warmup
from wys_nerfstudio.training.run_setup import copy_resumed_files, start_run
from wys_nerfstudio.training.run_state import STATE_KEY, RunState, random_state
from wys_nerfstudio.training.scene import EditableViews, LoopOptions, Scene
from wys_nerfstudio.training.schedule import Phase, PhaseSchedule
from wys_nerfstudio.training.settings import RunSettings, Settings
from wys_nerfstudio.utils.atomic_io import write_tensors
from wys_nerfstudio.utils.errors import WysError

RELEVANCE_FOLDER = "relevance"
"""Folder of the relevance maps, in a run's `wys` folder."""


@runtime_checkable
class TrainedScene(Scene, Protocol):
    """A scene that the run trains, saves and restores."""

    phase: Phase

    def set_edit_mask(self, mask_threshold: float, localized: bool) -> None:
        """Set what the outputs `relevance` and `edit_mask` show."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Restore weights."""
        ...

    def training_state(self) -> dict[str, Any]:
        """Return the state that is no weight, as plain data."""
        ...

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `training_state`."""
        ...


@runtime_checkable
class SessionOptions(LoopOptions, Protocol):
    """Options of a session that stay the same during a run."""

    base_run: Optional[Path]
    localize_steps: int
    edit_steps: int
    history_size: int


@dataclass
class Run:
    """What a session needs of the run that it belongs to."""

    folder: Path
    """The run's `wys` folder."""
    optimizers: Optimizers
    """Optimizers of the run."""
    use_patches: bool
    """Whether rays of the edit phase come in patches."""


class EditSession:
    """The edits of one run.

    Args:
        options: Options that stay the same during the run.
        settings: Options that can change during the run.
        scene: The scene.
        views: The scene's training views.
        editor: Return the editor, loading it on first use.
        weights: Return the weights of the whole run.
        make_maps: Compute or find the relevance maps of all views, in the run's `wys` folder.
        schedule: Phases of the run.
        overlap: As for `EditLoop`.
    """

    def __init__(
        self,
        options: SessionOptions,
        settings: Settings,
        scene: TrainedScene,
        views: EditableViews,
        editor: Callable[[], Editor],
        weights: Callable[[], dict[str, Any]],
        make_maps: Callable[[Path], None],
        schedule: PhaseSchedule,
        overlap: bool,
    ) -> None:
        self._options, self.settings, self._weights, self._make_maps = options, settings, weights, make_maps
        self._scene, self._views = scene, views
        self.edit_loop = EditLoop(options, settings, scene, views, editor, overlap)
        self.schedule = schedule
        self.cli_settings = settings.current
        """Settings that the run was started with."""
        self.history = History(Path(), options.history_size)
        """Instructions applied to the scene; belongs to the run's folder once the run has started."""
        self._localized = settings.current.localization != "none"
        self._lr_warmup_start = 0
        self._phase: Optional[Phase] = None
        self._run: Optional[Run] = None
        settings.subscribe(self._show_edit_mask)

    @property
    def localized(self) -> bool:
        """Whether the current edit has relevance. Without it, another localization takes effect with the next instruction."""
        return self._localized

    @localized.setter
    def localized(self, value: bool) -> None:
        """Set whether the current edit has relevance; the scene's outputs follow."""
        self._localized = value
        self._show_edit_mask(self.settings.current)

    def _show_edit_mask(self, settings: RunSettings) -> None:
        self._scene.set_edit_mask(settings.mask_threshold, self._localized and settings.localization != "none")

    @property
    def run(self) -> Run:
        """The run, once it has started."""
        assert self._run is not None
        return self._run

    @property
    def phase(self) -> Optional[Phase]:
        """Phase of the run; None before its first step and right after an instruction was applied."""
        return self._phase

    # ------------------------------------------------------------------------------------------------------- start

    def start(self, run: Run, transform: dict[str, Any]) -> None:
        """Start a run that is not resumed.

        Args:
            run: The run.
            transform: This run's `dataparser_transforms.json` as data.
        """
        self._run = run
        self.history = start_run(
            self._options.base_run,
            run.folder,
            self._scene,  # type: ignore  # a torch module
            self._views,
            transform,
            self.settings.current,
            self.schedule.reconstruct_steps,
            self._options.history_size,
        )

    def resume(self, run: Run, state: RunState, checkpoint: Path) -> None:
        """Continue a run, in its own folder or in another one.

        Args:
            run: The run.
            state: State in the checkpoint.
            checkpoint: File of the checkpoint.
        """
        self._run = run
        copy_resumed_files(state, run_folder(checkpoint) / "wys", run.folder)
        self.history = History(run.folder, self._options.history_size, state.history)
        self._views.load_views_state(state.views)
        # The checkpoint may be of another instruction than the images.
        self._views.write_relevance_images(run.folder / RELEVANCE_FOLDER, state.settings.instruction)
        self.edit_loop.load_state(state.edits, state.pending)
        self.edit_loop.recorded = state.recorded
        self._lr_warmup_start = state.lr_warmup_start
        self._scene.load_training_state(state.scene)
        CONSOLE.print(f"Resuming at step {state.step + 1} with {len(self._views.edited_views)} edited views.")

    # -------------------------------------------------------------------------------------------------- each step

    def prepare_relevance(self, phase: Phase) -> None:
        """Make the relevance maps that a phase needs, if there are none yet. The scene is not touched, so that the viewer may render
        meanwhile."""
        if phase is not Phase.RECONSTRUCT and self._localized and self._views.relevance_maps is None:
            self._make_maps(self.run.folder)

    def before_step(self, step: int) -> None:
        """Enter the phase of a step and make the edits that are due. The caller holds the train lock."""
        phase = self.schedule.phase(step)
        if phase is not self._phase:
            self.enter_phase(phase)
        if phase is not Phase.EDIT:
            return
        apply_lr_warmup(self.run.optimizers, step - self._lr_warmup_start)
        if self.edits_due(step):
            self.edit_loop.edit(step, self.run.folder)

    def edits_due(self, step: int) -> bool:
        """Return whether views are edited before a step."""
        return self.schedule.edits_due(step, self.settings.current.edit_every) and not self.edit_loop.paused

    def enter_phase(self, phase: Phase) -> None:
        """Prepare everything for a phase. The caller holds the train lock."""
        CONSOLE.print(f"Phase: {phase.value}.")
        self.prepare_relevance(phase)
        if phase is Phase.EDIT:
            self.edit_loop.build_visual_hull()
            self._views.use_edit_rays(self.run.use_patches)
            self._save_captured_scene()
            self._lr_warmup_start = max(self._lr_warmup_start, self.schedule.edit_start)
        elif phase is Phase.LOCALIZE:
            self._views.use_localize_rays()
        else:
            self._views.use_reconstruction_rays()
        self._phase = phase
        self._scene.phase = phase

    @property
    def has_captured_scene(self) -> bool:
        """Whether there is a captured scene to return to."""
        return (self.run.folder / CAPTURED_SCENE).is_file()

    def captured_scene(self) -> dict[str, Any]:
        """Return the checkpoint of the scene from before the first edit.

        Raises:
            WysError: If there is none, or it cannot be read.
        """
        if not self.has_captured_scene:
            raise WysError(
                f'There is no "{self.run.folder / CAPTURED_SCENE}" any more, so the captured scene cannot be restored: use '
                "Undo, or apply the instruction on top."
            )
        return read_checkpoint(self.run.folder / CAPTURED_SCENE)

    @main_process_only
    def _save_captured_scene(self) -> None:
        """Save the scene from before the first edit as a checkpoint that --base-run accepts."""
        unedited = self.edit_loop.edits == 0 and [entry.start for entry in self.history.entries] == ["captured"]
        if unedited and not self.has_captured_scene:
            content = {"step": self.schedule.edit_start - 1, "pipeline": self._weights()}
            write_tensors(self.run.folder / CAPTURED_SCENE, content)

    # -------------------------------------------------------------------------------------- apply, undo and reset

    def apply(self, instruction: str, step: int, captured: Optional[dict[str, Any]] = None) -> None:
        """Begin another instruction: new relevance maps, relevance head and edits.

        Args:
            instruction: What to change.
            step: The last trained step.
            captured: Result of `captured_scene`, to start from; None to start from scene and views as they are now.
        """
        if captured is None:
            self.edit_loop.commit(step + 1, self.run.folder)
            self._views.start_from_current()
        else:
            self.reset(step, captured)
        self._views.discard_relevance(self.run.folder / RELEVANCE_FOLDER)
        self._scene.reset_relevance()
        self.settings.update(instruction=instruction)
        self.localized = self.settings.current.localization != "none"
        localize_steps = self._options.localize_steps if trains_field(self.settings.current.localization) else 0
        self.schedule = PhaseSchedule(step + 1, localize_steps, self._options.edit_steps)
        self._restart_optimizers(step)

    def reset(self, step: int, captured: dict[str, Any]) -> None:
        """Return to the captured scene and views; no steps are left.

        Args:
            step: The last trained step.
            captured: Result of `captured_scene`.
        """
        self._scene.load_state_dict(model_state(captured))
        self._views.start_from_captured()
        self.edit_loop.load_state(self.edit_loop.edits, pending=[])
        self._restart_optimizers(step)

    def snapshot(self, step: int) -> dict[str, Any]:
        """Collective: return the run's state for `restore`: a checkpoint without optimizers, with the relevance maps. Given masks
        are not part of it: they are in their folder.

        Args:
            step: The last trained step.
        """
        maps = None
        if self._views.relevance_maps is not None and "masks" not in self.settings.localizations:
            maps = (self._views.relevance_maps, self._views.unclamped_maps)
        state = {"step": step, "pipeline": self._weights(), STATE_KEY: self.state(step).data()}
        return {**state, "relevance": maps}

    def restore(self, snapshot: dict[str, Any], step: int) -> None:
        """Return to a snapshot, with the steps that were left of its schedule.

        Args:
            snapshot: Result of `snapshot`, or the checkpoint of the base run.
            step: The last trained step.
        """
        state = RunState.from_checkpoint(snapshot, self.run.folder)
        self._scene.load_state_dict(model_state(snapshot))
        self._scene.load_training_state(state.scene)
        self._views.load_views_state(state.views)
        old = state.schedule
        self.schedule = PhaseSchedule(old.reconstruct_steps + step - state.step, old.localize_steps, old.edit_steps)
        self.edit_loop.load_state(state.edits, state.pending)
        self.settings.load(state.settings)
        self.localized = state.localized
        self._views.discard_relevance(self.run.folder / RELEVANCE_FOLDER)
        maps = snapshot.get("relevance")  # absent from a base run's checkpoint, and with given masks
        if maps is not None:
            self._views.set_relevance(*maps)
            self._views.write_relevance_images(self.run.folder / RELEVANCE_FOLDER, state.settings.instruction)
        else:
            self.prepare_relevance(Phase.EDIT)
        self._restart_optimizers(step)

    def _restart_optimizers(self, step: int) -> None:
        for optimizer in self.run.optimizers.optimizers.values():
            optimizer.state.clear()
        self._lr_warmup_start = step + 1
        self._phase = None

    # ------------------------------------------------------------------------------------------------- saving

    def state(self, step: int) -> RunState:
        """Collective: return what resuming needs beside weights and optimizers.

        Args:
            step: The last trained step.
        """
        return RunState(
            step=step,
            schedule=self.schedule,
            settings=self.settings.current,
            localized=self.localized,
            cli_settings=self.cli_settings,
            edits=self.edit_loop.edits,
            recorded=self.edit_loop.recorded,
            pending=[vars(edit) for edit in self.edit_loop.pending()],
            views=self._views.views_state(),
            history=self.history.data(),
            scene=self._scene.training_state(),
            lr_warmup_start=self._lr_warmup_start,
            random=gather(random_state()),
        )

    def write_images(self, views: dict[str, Any]) -> None:
        """Write edited views. They are for people: resuming reads the checkpoint only.

        Args:
            views: `RunState.views` of the checkpoint that is saved.
        """
        self._views.write_edited_views(self.run.folder / "edits", views)

    def finish(self, step: int) -> None:
        """Collective: commit the last edits.

        Args:
            step: The last trained step.
        """
        self.edit_loop.commit(step + 1, self.run.folder)
