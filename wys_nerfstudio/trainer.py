"""nerfstudio's trainer, taught three things: recipes and checks before anything starts, resuming by total steps, and
errors that are sentences instead of tracebacks."""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NoReturn, Optional

import torch
import yaml
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.misc import step_check
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.utils.writer import EventName, TimeWriter
from nerfstudio.viewer.viewer import Viewer

from wys_nerfstudio.pipeline import WysPipeline, WysPipelineConfig
from wys_nerfstudio.training.checkpoint import (
    find_checkpoint,
    is_wys,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint_file,
)
from wys_nerfstudio.training.devices import check_devices, choose_device
from wys_nerfstudio.training.distributed import broadcast_from_main, convert_lost_rank_errors, main_process_only, rank
from wys_nerfstudio.training.interrupts import (
    INTERRUPTED,
    GracefulInterrupt,
    convert_disk_errors,
    exit_on_error,
    resume_hint,
)
from wys_nerfstudio.training.options import validate_ranges
from wys_nerfstudio.training.run_state import STATE_KEY, RunState, set_random_state
from wys_nerfstudio.utils.atomic_io import write_text
from wys_nerfstudio.utils.data_checks import check_capture
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.log_filters import ignore_warnings
from wys_nerfstudio.utils.recipes import parse_with_recipe
from wys_nerfstudio.viewer.commands import CommandHandler


@dataclass
class WysTrainerConfig(TrainerConfig):
    """Options of a run."""

    _target: type = field(default_factory=lambda: WysTrainer)
    pipeline: WysPipelineConfig = field(default_factory=WysPipelineConfig)
    """Scene, data and editing."""
    recipe: Optional[Path] = None
    """YAML file of options, written as they are typed but without the dashes; what is typed wins over it."""
    max_num_iterations: Optional[int] = None  # type: ignore
    """Stop after this many steps in all; by default when all three phases are through."""

    def set_timestamp(self) -> None:
        """Settles everything that must be settled before nerfstudio saves config.yml and starts.

        nerfstudio's train script calls this first thing after parsing, once per run. Errors end the program here, with
        their sentence and without a traceback.
        """
        ignore_warnings()
        with exit_on_error():
            self._resolve()
        super().set_timestamp()
        with exit_on_error():
            self._refuse_to_overwrite()
            self._refuse_nonsense()

    def save_config(self) -> None:
        """Writes config.yml, whole or not at all."""
        path = self.get_base_dir() / "config.yml"
        with exit_on_error():
            try:
                write_text(path, yaml.dump(self))
            except OSError as error:
                raise WysError(
                    f'The run\'s folder "{path.parent}" cannot be written: {error.strerror}. Give another one with '
                    "--output-dir."
                ) from error

    def _refuse_to_overwrite(self) -> None:
        resumed, folder = self.pipeline.resume_from, self.get_checkpoint_dir()
        if newest_checkpoint(folder) is not None and (resumed is None or resumed.parent.resolve() != folder.resolve()):
            raise WysError(
                f'There is a run in "{self.get_base_dir()}" already: {resume_hint(self.get_base_dir())[:-1]}, or leave out '
                "--timestamp to start another one."
            )

    def _refuse_nonsense(self) -> None:
        """Refuses numbers of nerfstudio's own options with which training cannot begin."""
        validate_ranges("", self, {"max_num_iterations": 1, "steps_per_save": 0})
        if not 0 <= self.machine.seed < 2**32:
            raise WysError(f"--machine.seed must be from 0 to {2**32 - 1}, not {self.machine.seed}.")
        check_devices(self.machine, self.pipeline.edit_count, self.pipeline.edit_every)
        for name, group in self.optimizers.items():
            flag = f"optimizers.{name.replace('_', '-')}"
            validate_ranges(f"{flag}.optimizer.", group["optimizer"], {"lr": 0, "eps": 0, "max_norm": 0})
            if group["scheduler"] is not None:
                validate_ranges(f"{flag}.scheduler.", group["scheduler"], {"max_steps": 1, "lr_final": 0})

    def _resolve(self) -> None:
        if self.recipe is not None:
            parsed = parse_with_recipe(str(self.method_name), self.recipe)
            for option in fields(self):
                setattr(self, option.name, getattr(parsed, option.name))
            # What nerfstudio's script had done to the first parse.
            if self.data is not None:
                self.pipeline.datamanager.data = self.data
        self._take_prompt()
        self.pipeline.cli_settings = {"instruction": self.pipeline.instruction, **self.pipeline.live_settings()}
        choose_device(self.method_name, self.machine, self.pipeline.model)
        resumed = self._take_load_dir()
        self.pipeline.check()
        self._check_data()
        if self.max_num_iterations is None:
            self.max_num_iterations = self.pipeline.plan().total_steps
        if resumed is not None:
            self._refuse_finished(resumed)

    def _check_data(self) -> None:
        manager = self.pipeline.datamanager
        data = manager.data or manager.dataparser.data
        if not data.exists():
            raise WysError(f'There is no data at "{data}": give --data a folder of captured views.')
        if isinstance(manager.dataparser, NerfstudioDataParserConfig):
            check_capture(data, manager.dataparser.downscale_factor)

    def _take_prompt(self) -> None:
        """nerfstudio's own --prompt means the instruction here, as its users expect."""
        if self.prompt is None:
            return
        if self.pipeline.instruction and self.pipeline.instruction != self.prompt:
            raise WysError("--prompt and --instruction mean the same and say different things here: give one of them.")
        self.pipeline.instruction = self.prompt

    def _take_load_dir(self) -> Optional[RunState]:
        """A checkpoint of this method is resumed; one of nerfacto is a base, as Instruct-NeRF2NeRF's users type it.

        Returns:
            The state of the run that is resumed, if one is.
        """
        given = self.load_checkpoint or self.load_dir
        if given is None:
            return None
        path = find_checkpoint(given, "--load-dir", self.load_step)
        # What is written into config.yml must not send ns-eval to that step, too.
        self.load_dir, self.load_checkpoint, self.load_step = path.parent, None, None
        checkpoint = read_checkpoint(path)
        if is_wys(checkpoint):
            state = RunState.of(checkpoint, path)
            self.pipeline.adopt_resumed_run(path, state)
            return state
        if self.pipeline.base_run is not None:
            raise WysError("--load-dir holds a nerfacto run and --base-run is given too: give one of them.")
        CONSOLE.print(f'"{self.load_dir}" is no wys run: it is taken as the base, as with --base-run.')
        self.pipeline.base_run, self.load_dir = path, None
        return None

    def _refuse_finished(self, resumed: RunState) -> None:
        """A finished run has nothing to train, but with a viewer other instructions can be applied to it."""
        assert self.max_num_iterations is not None
        done = resumed.step + 1
        through = done >= self.max_num_iterations or resumed.history[-1]["start"] == "reset"
        if through and (not self.is_viewer_enabled() or self.viewer.quit_on_train_completion):
            raise WysError(
                f"The run is through: it has {done} of {self.max_num_iterations} steps. For more editing raise "
                "--pipeline.edit-steps; for another edit give this run to --base-run."
            )


class WysTrainer(Trainer):
    """nerfstudio's trainer with the total number of steps as its measure, which the viewer's panel can move."""

    config: WysTrainerConfig
    pipeline: WysPipeline  # type: ignore
    last_step: int
    """The run's last step; it moves when instructions are applied and taken back."""

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """As nerfstudio's; what fails here fails before the first step."""
        CONSOLE.quiet = rank() > 0
        try:
            with exit_on_error(), convert_disk_errors(self.base_dir), convert_lost_rank_errors():
                super().setup(test_mode)
        except SystemExit:
            self._remove_empty_run()
            raise

    @main_process_only
    def _remove_empty_run(self) -> None:
        """Removes the folder of a run that did not begin, if nothing but its config.yml is in it."""
        if self.base_dir.is_dir() and [path.name for path in self.base_dir.iterdir()] == ["config.yml"]:
            (self.base_dir / "config.yml").unlink()
            for folder in (self.base_dir, *self.base_dir.parents):
                if folder == self.config.output_dir or any(folder.iterdir()):
                    return
                folder.rmdir()

    def train(self) -> None:
        """Trains what is left of the run, and what is asked for in the viewer after that.

        A loop of its own: nerfstudio 1.1.5 counts `max_num_iterations` from the resumed step on, cannot be given more
        or less to do once it has begun, and hears nothing while it is paused.
        """
        assert self.config.max_num_iterations is not None
        self.step, self.last_step, self.stop_training = self._start_step - 1, self.config.max_num_iterations - 1, False
        self._paused = self._interrupted = self._stopped = False
        with (
            exit_on_error(),
            convert_disk_errors(self.base_dir),
            convert_lost_rank_errors(),
            GracefulInterrupt() as self._interrupts,
        ):
            self._steering = CommandHandler(self)
            if self._steering.was_reset:
                self.last_step = self.step
            if self._left() <= 0:
                self._reopen()
            self._started = self.step
            self._save_transform()
            self._init_viewer_state()
            random = self.pipeline.resumed and self.pipeline.resumed.random_of_this_rank()
            if random is not None:
                set_random_state(random)
            self._listen()
            while self._left() > 0 and not self._stopped:
                with TimeWriter(writer, EventName.TOTAL_TRAIN_TIME):
                    self._train_steps()
                if self._interrupted and self._left() > 0:
                    self._stop_here()
                self._after_train()
            if self._interrupted:
                self.shutdown()

    def _left(self) -> int:
        return self.last_step - self.step

    def _train_steps(self) -> None:
        while self._left() > 0 and not self._stopped:
            if self._paused:
                time.sleep(0.02)
            else:
                self._train_step(self.step + 1)
            self._listen()

    def _listen(self) -> None:
        """Takes requests, and learns from the first rank, which has the viewer, what comes next."""
        self._steering.take_requests(self.step)
        self._paused, self._interrupted, shut_down = broadcast_from_main(
            lambda: (self.training_state == "paused", self._interrupts.came, self.stop_training)
        )
        self._stopped = self._interrupted or shut_down

    @main_process_only
    def _save_transform(self) -> None:
        outputs = self.pipeline.datamanager.train_dataparser_outputs
        outputs.save_dataparser_transform(self.base_dir / "dataparser_transforms.json")

    def _stop_here(self) -> NoReturn:
        """Saves what there is, and says how to go on."""
        self.shutdown()
        sentence = "Stopped before the first step; there is nothing to save."
        if self.step > self._started:
            self.save_checkpoint(self.step)
            sentence = f"Stopped after step {self.step}; {resume_hint(self.base_dir)}"
        if rank() == 0:
            print(f"wys: {sentence}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)

    def _refuse_unless_finite(self, step: int, what: str, *values: torch.Tensor) -> None:
        if all(bool(value.isfinite().all()) for value in values):
            return
        good = newest_checkpoint(self.checkpoint_dir)
        self.shutdown()
        raise WysError(
            f"{what} no finite number any more at step {step}: training stops and saves nothing. "
            + (f'The last good checkpoint is "{good}"; ' if good else "There is no checkpoint yet; ")
            + "try lower learning rates, such as --optimizers.fields.optimizer.lr 0.001"
            + (f', and --load-dir "{good}".' if good else ".")
        )

    def _train_step(self, step: int) -> None:
        """One step, with all that nerfstudio does around it."""
        self.step = step
        with self.train_lock, TimeWriter(writer, EventName.ITER_TRAIN_TIME, step=step) as timer:
            self.pipeline.train()
            for callback in self.callbacks:
                callback.run_callback_at_location(step, location=TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            loss, losses, metrics = self.train_iteration(step)
            self._refuse_unless_finite(step, "The loss is", loss.detach())
            for callback in self.callbacks:
                callback.run_callback_at_location(step, location=TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        if step > 1:  # the first ones are slow
            rays = self.pipeline.datamanager.get_train_rays_per_batch()
            rate = self.world_size * rays / max(0.001, timer.duration)
            writer.put_time(EventName.TRAIN_RAYS_PER_SEC, rate, step=step, avg_over_steps=True)
        self._update_viewer_state(step)
        if step_check(step, self.config.logging.steps_per_log, run_at_zero=True):
            writer.put_scalar("Train Loss", loss, step)
            writer.put_dict("Train Loss Dict", losses, step)
            writer.put_dict("Train Metrics Dict", metrics, step)
            writer.put_scalar("GPU Memory (MB)", torch.cuda.max_memory_allocated() / 2**20, step)
        if self.pipeline.datamanager.eval_dataset:
            with self.train_lock:
                self.eval_iteration(step)
        if step_check(step, self.config.steps_per_save):
            self.save_checkpoint(step)
        writer.write_out_storage()

    def _reopen(self) -> None:
        """Shows a finished run, so that other instructions can be applied to it."""
        with self.train_lock:
            self.pipeline.enter_phase(self.pipeline.plan.phase(self.step))
        self._init_viewer_state()
        self._train_complete_viewer()

    def set_total_steps(self, steps: int, paused: bool = False) -> None:
        """Moves the run's end.

        Args:
            steps: Steps of the whole run.
            paused: Whether training waits for nerfstudio's Resume Training; if not, it goes on.
        """
        self.last_step = steps - 1
        paused = paused and self._left() > 0
        self.training_state = "paused" if paused else "training"
        if isinstance(self.viewer_state, Viewer):
            self.viewer_state.pause_train.visible = not paused
            self.viewer_state.resume_train.visible = paused

    def redraw(self) -> None:
        """Lets the viewer draw the scene anew, whatever it is drawing."""
        if isinstance(self.viewer_state, Viewer):
            with suppress(KeyError):  # as below
                self.viewer_state._trigger_rerender()

    def _update_viewer_state(self, step: int) -> None:
        # nerfstudio tells every client of a list that it has copied; one that has left since is no longer in its table.
        with suppress(KeyError):
            super()._update_viewer_state(step)

    def _train_complete_viewer(self) -> None:
        """Waits, as nerfstudio does, but for requests."""
        if not self.config.is_viewer_enabled():
            return
        if isinstance(self.viewer_state, Viewer):
            self.viewer_state.training_complete()
        CONSOLE.print("Use ctrl+c to quit", justify="center")
        while self._left() <= 0 and not self._stopped:
            self.training_state = "completed"
            time.sleep(0.02)
            self._listen()

    def _after_train(self) -> None:
        """Leaves all that is to be left before the last checkpoint says that the run is through."""
        self.pipeline.finish(self.step)
        super()._after_train()

    def _load_checkpoint(self) -> None:
        """Takes over everything of the run that is resumed but the state, which is the pipeline's business."""
        path = self.config.pipeline.resume_from
        if path is None:
            return
        checkpoint = read_checkpoint(path)
        self.pipeline.resumed = RunState.of(checkpoint, path)
        self._start_step = checkpoint["step"] + 1
        self.pipeline.load_pipeline(checkpoint["pipeline"], checkpoint["step"])
        self.optimizers.load_optimizers(checkpoint["optimizers"])
        if self.config.load_scheduler:
            self.optimizers.load_schedulers(checkpoint["schedulers"])
        self.grad_scaler.load_state_dict(checkpoint["scalers"])

    def save_checkpoint(self, step: int) -> None:
        """Saves weights, optimizers, edited views and the run's state in one file: a run that is killed at any moment has
        all of one step or all of another."""
        pipeline, optimizers = self.pipeline, self.optimizers
        self._refuse_unless_finite(step, "A weight is", *(value.detach() for value in pipeline.parameters()))
        pipeline.write_pictures()
        checkpoint = {
            "step": step,
            "pipeline": pipeline.weights(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
            STATE_KEY: pipeline.run_state(step).data(),
        }
        save_checkpoint_file(self.checkpoint_dir, checkpoint, self.config.save_only_latest_checkpoint)
        pipeline.history.prune()
        if self._steering.changed:
            self._save_config()

    @main_process_only
    def _save_config(self) -> None:
        """Writes config.yml again, so that whatever opens the run sees the settings that it ended with."""
        total, self.config.max_num_iterations = self.config.max_num_iterations, self.last_step + 1
        self.config.save_config()
        self.config.max_num_iterations = total
