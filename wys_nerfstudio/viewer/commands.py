"""Carries out what is asked for in the viewer, between two training steps and never within one."""

import time
from threading import Lock
from typing import Optional, Protocol, runtime_checkable

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.pipeline import WysPipeline
from wys_nerfstudio.training.distributed import broadcast_from_main, rank
from wys_nerfstudio.training.history import History
from wys_nerfstudio.training.schedule import Phase
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.viewer.panel import ON_TOP, ViewerCommand

STATUS_SECONDS = 0.5
"""Least time between two changes of the status line."""


@runtime_checkable
class TrainerProtocol(Protocol):
    """What is steered: the trainer."""

    pipeline: WysPipeline
    train_lock: Lock
    training_state: str
    last_step: int
    """The run's last step."""

    def save_checkpoint(self, step: int) -> None:
        """Saves everything as of a step."""

    def redraw(self) -> None:
        """Lets the viewer draw the scene anew, whatever it is drawing."""

    def set_total_steps(self, steps: int, paused: bool = False) -> None:
        """Moves the run's end to that many steps in all."""


class CommandHandler:
    """Takes requests out of the panel's queue, one after the other.

    Args:
        run: The run. Its end is moved when an instruction is applied or taken back.
    """

    def __init__(self, run: TrainerProtocol) -> None:
        self._run = run
        self.changed = False
        """Whether anything was asked for that config.yml does not tell yet."""
        self._message = ""
        self._shown_at = 0.0
        self._step_seconds: Optional[float] = None
        self._latest: Optional[tuple[int, float]] = None
        pipeline = self.pipeline
        pipeline.report = self._show

    @property
    def pipeline(self) -> WysPipeline:
        """The run's pipeline."""
        return self._run.pipeline

    @property
    def history(self) -> History:
        """What was applied to the scene."""
        return self.pipeline.history

    @property
    def was_reset(self) -> bool:
        """Whether the latest thing that happened was a reset, so that there is nothing to go on with."""
        return self.history.entries[-1].start == "reset"

    def take_requests(self, step: int) -> None:
        """Carries out all that was asked for since the last call, on all ranks, and refreshes the status line.

        Args:
            step: The step that has just been trained.
        """
        controls = self.pipeline.controls
        while (request := broadcast_from_main(controls.take)) is not None:
            # A big picture is drawn for seconds with the lock held; drawing it anew lets the request in between.
            self._run.redraw()
            with self._run.train_lock:
                try:
                    self._message = self._carry_out(request, step)
                    self.changed |= request.action != "preview"
                except WysError as error:
                    self._message = str(error)
                    CONSOLE.print(f"wys: {error}")
            config = self.pipeline.config
            controls.show_settings(config.instruction, config.live_settings())
            self._run.redraw()
            self._shown_at = 0.0
        self._measure(step)
        if time.monotonic() - self._shown_at > STATUS_SECONDS:
            self._show(self._progress(step))

    def _carry_out(self, request: ViewerCommand, step: int) -> str:
        pipeline = self.pipeline
        if request.action == "set":
            pipeline.update_setting(request.name, request.value)
            if request.name == "localization" and request.value != "none" and not pipeline.scene_model.localized:
                return "From the next Apply on: the present edit began without relevance."
            return ""
        if request.action == "pause":
            pipeline.edit_loop.paused = bool(request.value)
            return "No further views are edited until Pause editing is off." if request.value else ""
        editing = pipeline.plan.phase(step) is Phase.EDIT
        # What was applied by mistake can be taken back while it is being localised, but not the run's first instruction.
        if not (editing or (pipeline.has_captured_scene and request.action != "preview")):
            raise WysError(f"{request.action.capitalize()} is possible once editing has begun.")
        if request.action == "preview":
            return self._preview(request)
        message = {"apply": self._apply, "undo": self._undo, "reset": self._reset}[request.action](request, step)
        # The history on disk and the newest checkpoint must tell the same story.
        self._run.save_checkpoint(step)
        return message

    def _apply(self, request: ViewerCommand, step: int) -> str:
        pipeline, instruction = self.pipeline, str(request.value).strip()
        if not instruction:
            raise WysError('There is no instruction: say what to change, such as "Turn the bear into a panda".')
        pipeline.editor().encode_text(instruction)
        on_top = request.name == ON_TOP
        start = "on top" if on_top else "instead"
        self.history.add(instruction, start, pipeline.config.live_settings(), step + 1, pipeline.snapshot(step))
        pipeline.apply(instruction, on_top, step)
        self._run.set_total_steps(pipeline.plan.total_steps)
        return ""

    def _undo(self, request: ViewerCommand, step: int) -> str:
        undone = self.history.entries[-1]
        self.pipeline.restore(self.history.last_snapshot(), step)
        self.history.drop_last()
        left = 0 if self.was_reset else self.pipeline.plan.total_steps - step - 1
        # Going on at once would change the very scene that was asked back.
        self._run.set_total_steps(step + 1 + left, paused=True)
        what = "The reset" if undone.start == "reset" else f'"{undone.instruction}"'
        return f"{what} is undone." + (
            f" Resume Training goes on with the {left} steps that were left." if left else ""
        )

    def _reset(self, request: ViewerCommand, step: int) -> str:
        pipeline = self.pipeline
        if self.was_reset:
            raise WysError("This is the captured scene already.")
        instruction, settings = pipeline.config.instruction, pipeline.config.live_settings()
        self.history.add(instruction, "reset", settings, step + 1, pipeline.snapshot(step))
        pipeline.reset(step)
        self._run.set_total_steps(step + 1)
        return "This is the captured scene. Undo brings the edit back, Apply begins another one."

    def _preview(self, request: ViewerCommand) -> str:
        if rank() > 0:
            return ""
        data = self.pipeline.datamanager
        poses = data.train_dataset.cameras.camera_to_worlds.cpu()
        wanted = torch.tensor(request.value)
        # A step of the scene's size counts as much as a turn by a radian.
        distance = (poses[:, :, 3] - wanted[:3]).norm(dim=-1) + (-poses[:, :, 2] - wanted[3:]).norm(dim=-1)
        view = int(distance.argmin())
        self._show("editing a view for the preview")
        instruction = request.name.strip() or self.pipeline.config.instruction
        captured, mask, edited = self.pipeline.edit_loop.preview(view, instruction)
        pictures = [captured, mask[..., None].expand(-1, -1, 3).float(), edited]
        self.pipeline.controls.show_preview(
            f'"{instruction}" in {data.view_names[view]}: before, mask, edited', pictures
        )
        return ""

    # ------------------------------------------------------------------------------------------------------- the status

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        if self._latest is not None and step == self._latest[0] + 1:
            seconds = now - self._latest[1]
            self._step_seconds = 0.95 * (self._step_seconds or seconds) + 0.05 * seconds
        self._latest = (step, now)

    def _progress(self, step: int) -> str:
        pipeline, edits, last = self.pipeline, self.pipeline.edit_loop, self._run.last_step
        phase = pipeline.plan.phase(step).value
        left = last - step
        parts = ["finished" if left <= 0 else f"{phase}, step {step + 1} of {last + 1}"]
        if self._run.training_state == "paused":
            parts[0] += " (paused)"
        parts.append(f"{edits.edits - edits.skipped} edits, {edits.skipped} skipped")
        if edits.seconds_per_edit is not None:
            parts.append(f"{edits.seconds_per_edit:.2f} s per edit")
        if left > 0 and self._step_seconds is not None:
            minutes, seconds = divmod(round(left * self._step_seconds), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return ", ".join(parts)

    def _show(self, progress: str) -> None:
        self._shown_at = time.monotonic()
        message = f"\n\n*{self._message}*" if self._message else ""
        self.pipeline.controls.show_status(f"**{progress}**{message}")
