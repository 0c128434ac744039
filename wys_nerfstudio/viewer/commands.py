"""Carries out the panel's commands, between two training steps and never within one."""

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from typing import Optional, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from wys_nerfstudio.editing import Editor
from wys_nerfstudio.training.distributed import broadcast_from_main, rank, world_size
from wys_nerfstudio.training.history import ApplyMode
from wys_nerfstudio.training.memory import RunActivity
from wys_nerfstudio.training.scene import EditableViews, Scene
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.training.session import EditSession
from wys_nerfstudio.training.settings import Settings
from wys_nerfstudio.utils.cameras import nearest_camera
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import MemoryExhaustedError
from wys_nerfstudio.utils.visualization import overlay
from wys_nerfstudio.viewer.panel import ON_TOP, ViewerCommand, ViewerPanel
from wys_nerfstudio.viewer.speed import RecentSteps

STATUS_SECONDS = 0.5
"""Minimum time between two updates of the status line."""
READ_ONLY = ("preview", "view", "export")
"""Commands that only the main process carries out and that change nothing in the run."""


@runtime_checkable
class PipelineProtocol(Protocol):
    """The parts of the pipeline that commands act on."""

    @property
    def session(self) -> EditSession:
        """Edits of the run."""
        ...

    @property
    def settings(self) -> Settings:
        """Owner of the settings."""
        ...

    @property
    def panel(self) -> ViewerPanel:
        """The panel."""
        ...

    @property
    def scene_model(self) -> Scene:
        """The scene."""
        ...

    @property
    def datamanager(self) -> EditableViews:
        """The training views."""
        ...

    report: Callable[[str], None]

    def editor(self) -> Editor:
        """Return the editor, loading it on first use."""
        ...

    def export(self, folder: Path) -> str:
        """Write the training views as they are now as a data set, and return what was written, in words."""
        ...


@runtime_checkable
class TrainerProtocol(Protocol):
    """The parts of the trainer that commands act on."""

    @property
    def pipeline(self) -> PipelineProtocol:
        """The run's pipeline."""
        ...

    train_lock: Lock
    training_state: str
    last_step: int
    """Last step of the run."""

    def save_checkpoint(self, step: int) -> None:
        """Save everything as of a step."""
        ...

    def finish_writes(self) -> None:
        """Wait for files that are being written."""
        ...

    def convert_memory_errors(self, activity: RunActivity) -> AbstractContextManager[None]:
        """Convert errors of memory that ran out to a `MemoryExhaustedError` that names the options to change."""
        ...

    def redraw(self) -> None:
        """Make the viewer render the scene again, interrupting the current render."""
        ...

    def hide_cameras(self) -> None:
        """Hide the training cameras in the viewer."""
        ...

    def set_total_steps(self, steps: int, paused: bool = False) -> None:
        """Move the end of the run."""
        ...


class CommandHandler:
    """Takes commands from the panel's queue, one after the other.

    Args:
        trainer: The run. Its end moves when an instruction is applied or undone.
    """

    def __init__(self, trainer: TrainerProtocol) -> None:
        self._trainer = trainer
        self._message = ""
        self._shown_at = 0.0
        self._recent = RecentSteps()
        self._latest: Optional[tuple[int, float, int]] = None
        self._applied_after: Optional[int] = None
        self.pipeline.report = self._show

    @property
    def pipeline(self) -> PipelineProtocol:
        """The run's pipeline."""
        return self._trainer.pipeline

    @property
    def session(self) -> EditSession:
        """The run's edits."""
        return self.pipeline.session

    @property
    def was_reset(self) -> bool:
        """Whether the last entry of the history is a reset, so that there are no steps left."""
        return self.session.history.entries[-1].start == "reset"

    def run_commands(self, step: int) -> None:
        """Collective: carry out all commands since the last call and update the status line.

        Args:
            step: The last trained step.
        """
        panel, settings = self.pipeline.panel, self.pipeline.settings
        self._measure(step)
        while (command := broadcast_from_main(panel.take)) is not None:
            # A large render holds the lock for seconds; interrupting it lets the command in.
            self._trainer.redraw()
            self._trainer.finish_writes()  # commands write and remove files, too
            with self._trainer.train_lock:
                entries = len(self.session.history.entries)
                try:
                    with self._trainer.convert_memory_errors("edits"):
                        self._message = self._run(command, step)
                except MemoryExhaustedError as error:
                    if command.action == "undo" or (world_size() > 1 and command.action not in READ_ONLY):
                        raise  # the scene, or another process, may be in an unknown state
                    self._refuse(error)
                    if len(self.session.history.entries) > entries:
                        self._undo_last(step)
                except WysError as error:
                    self._refuse(error)
            panel.show_settings(settings.current)
            self._trainer.redraw()
            self._shown_at = 0.0
        if time.monotonic() - self._shown_at > STATUS_SECONDS:
            self._show(self._progress(step))
        self._latest = (step, time.monotonic(), self._edited)

    def _refuse(self, error: WysError) -> None:
        self._message = str(error)
        CONSOLE.print(f"wys: {error}", markup=False)

    def _undo_last(self, step: int) -> None:
        self._message += f" {self._run(ViewerCommand('undo'), step)}"

    def undo_failed_apply(self, step: int, error: MemoryExhaustedError) -> bool:
        """Undo the instruction that was just applied, because its relevance maps need more memory than there is.

        Args:
            step: The last trained step.
            error: What failed.

        Returns:
            False, and nothing is undone, if no instruction was applied after that step, or if there are other processes,
            which may have had enough memory.
        """
        if step != self._applied_after or world_size() > 1:
            return False
        self._refuse(error)
        with self._trainer.train_lock:
            self._undo_last(step)
        self.pipeline.panel.show_settings(self.pipeline.settings.current)
        return True

    def _run(self, command: ViewerCommand, step: int) -> str:
        session = self.session
        if command.action == "set":
            self.pipeline.settings.update(**{command.name: command.value})
            if command.name == "localization" and command.value != "none" and not session.localized:
                return "In effect with the next Apply: the current edit began without relevance."
            return ""
        if command.action == "pause":
            session.edit_loop.paused = bool(command.value)
            return "No further views are edited until Pause editing is off." if command.value else ""
        if command.action == "view":
            return self._show_view(command, step)
        if command.action == "export":
            return self._export(step)
        editing = session.schedule.phase(step) is Phase.EDIT
        # An instruction applied by mistake can be undone while it is being localized, but not the run's first one.
        if not (editing or (session.has_captured_scene and command.action != "preview")):
            raise WysError(f"{command.action.capitalize()} is possible once editing has begun.")
        if command.action == "preview":
            return self._preview(command)
        message = {"apply": self._apply, "undo": self._undo, "reset": self._reset}[command.action](command, step)
        # The history on disk and the newest checkpoint must agree.
        self._trainer.save_checkpoint(step)
        return message

    def _apply(self, command: ViewerCommand, step: int) -> str:
        session, instruction = self.session, str(command.value).strip()
        if not instruction:
            raise WysError('There is no instruction: say what to change, such as "Turn the bear into a panda".')
        self.pipeline.editor().encode_text(instruction)
        on_top = command.name == ON_TOP
        mode: ApplyMode = "on top" if on_top else "instead"
        captured = None if on_top else session.captured_scene()
        settings = self.pipeline.settings.current.as_dict()
        session.history.add(instruction, mode, settings, step + 1, session.snapshot(step))
        session.apply(instruction, step, captured)
        self._applied_after = step
        self._trainer.set_total_steps(session.schedule.total_steps)
        return ""

    def _undo(self, command: ViewerCommand, step: int) -> str:
        session = self.session
        undone = session.history.entries[-1]
        session.restore(session.history.last_snapshot(), step)
        session.history.drop_last()
        self._applied_after = None
        left = 0 if self.was_reset else session.schedule.total_steps - step - 1
        # Paused: training on at once would change the scene that was restored.
        self._trainer.set_total_steps(step + 1 + left, paused=True)
        what = "The reset" if undone.start == "reset" else f'"{undone.instruction}"'
        hint = f" Resume Training continues with the remaining {left} steps." if left else ""
        return f"{what} is undone.{hint}"

    def _reset(self, command: ViewerCommand, step: int) -> str:
        session = self.session
        if self.was_reset:
            raise WysError("This is the captured scene already.")
        settings, captured = self.pipeline.settings.current, session.captured_scene()
        session.history.add(settings.instruction, "reset", settings.as_dict(), step + 1, session.snapshot(step))
        session.reset(step, captured)
        self._trainer.set_total_steps(step + 1)
        return "This is the captured scene. Undo restores the edit, Apply begins another one."

    def _preview(self, command: ViewerCommand) -> str:
        if rank() > 0:
            return ""
        views, view = self.pipeline.datamanager, self._nearest_view(command)
        self._show("editing a view for the preview")
        instruction = command.name.strip() or self.pipeline.settings.current.instruction
        before, mask, edited = self.session.edit_loop.preview(view, instruction)
        images = [before, mask[..., None].expand(-1, -1, 3).float(), edited]
        self.pipeline.panel.show_images(f'"{instruction}" in {views.view_names[view]}: before, mask, edited', images)
        return ""

    def _show_view(self, command: ViewerCommand, step: int) -> str:
        if rank() > 0:
            return ""
        pipeline, views, view = self.pipeline, self.pipeline.datamanager, self._nearest_view(command)
        if command.client is not None:
            self._trainer.hide_cameras()  # the image of this one would cover the render
            pipeline.panel.move_camera(command.client, pipeline.scene_model.pose_corrected_camera(views.cameras, view))
        images = self._images_of(view)
        missing = {1: " (not edited yet)", 2: " (not edited by this instruction yet)"}.get(len(images), "")
        caption = f"{views.view_names[view]} at step {step + 1}: {', '.join(images)}{missing}"
        pipeline.panel.show_images(caption, list(images.values()))
        return ""

    def _export(self, step: int) -> str:
        if rank() > 0:
            return ""
        if not self.pipeline.datamanager.edited_views:
            raise WysError("There is nothing to export yet: no view is edited.")
        folder = self.session.run.folder.parent / f"export-{step}"
        if folder.exists():
            raise WysError(f'The data set of this step is there already: move or remove "{folder}" to write it again.')
        try:
            return f'Wrote {self.pipeline.export(folder)} to "{folder}".'
        except OSError as error:
            raise WysError(f'The data set could not be written to "{folder}": {error.strerror}.') from error
        finally:
            if not (folder / "transforms.json").exists():  # it is written last
                shutil.rmtree(folder, ignore_errors=True)

    def _images_of(self, view: int) -> dict[str, Float[Tensor, "h w 3"]]:
        """Return the images of a view by name: captured, edited if it is, and what the current instruction has edited, tinted."""
        views = self.pipeline.datamanager
        captured, reference, current = (
            images([view])[0].cpu() for images in (views.captured_views, views.reference_views, views.current_views)
        )
        images = {"captured": captured}
        if view in views.edited_views:
            images["edited"] = current
        # The reference is what an edit keeps outside its mask.
        edited_pixels = (current != reference).any(dim=-1, keepdim=True)
        if edited_pixels.any():
            images["edited pixels"] = overlay(current, edited_pixels.float())
        return images

    def _nearest_view(self, command: ViewerCommand) -> int:
        camera = torch.tensor(command.value)
        return nearest_camera(self.pipeline.datamanager.cameras, camera[:3], camera[3:])

    # ------------------------------------------------------------------------------------------------------- the status

    @property
    def _edited(self) -> int:
        """Number of edits so far, without skipped ones."""
        return self.session.edit_loop.edits - self.session.edit_loop.skipped

    def _measure(self, step: int) -> None:
        """Record the step that was trained since the last call, if there was one. Commands and pauses do not count."""
        if self._latest is None or step != self._latest[0] + 1:
            return
        schedule = self.session.schedule
        if schedule.phase(step) is not schedule.phase(step - 1):
            self._recent.clear()
        _, began, edited = self._latest
        self._recent.add(time.monotonic() - began, self._edited - edited, self.pipeline.settings.current.edit_every)

    def _progress(self, step: int) -> str:
        loop, last = self.session.edit_loop, self._trainer.last_step
        phase = self.session.schedule.phase(step)
        left = last - step
        parts = ["finished" if left <= 0 else f"{phase.value}, step {step + 1} of {last + 1}"]
        if self._trainer.training_state == "paused":
            parts[0] += " (paused)"
        parts.append(f"{self._edited} edits" + (f", {loop.skipped} skipped" if loop.skipped else ""))
        if left > 0:
            rate = self._recent.edits_per_minute(self.pipeline.settings.current.edit_every)
            if phase is Phase.EDIT and rate is not None and not loop.paused:
                parts.append(f"{rate:.1f} edits/min")
            step_seconds = self._recent.seconds_per_step()
            if step_seconds is not None:
                minutes, seconds = divmod(round(left * step_seconds), 60)
                parts.append(f"{minutes}:{seconds:02d} left")
        return ", ".join(parts)

    def _show(self, progress: str) -> None:
        self._shown_at = time.monotonic()
        self.pipeline.panel.show_status(progress, self._message)
