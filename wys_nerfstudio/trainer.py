"""nerfstudio's trainer, with recipes and validation before anything starts, resuming by total steps, and error messages
instead of tracebacks."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NoReturn, Optional

import torch
import yaml
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.misc import step_check
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.utils.writer import EventName, TimeWriter
from nerfstudio.viewer.viewer import Viewer

from wys_nerfstudio.pipeline import WysPipeline, WysPipelineConfig
from wys_nerfstudio.training.checkpoint import (
    copy_to_cpu,
    find_checkpoint,
    is_wys,
    newest_checkpoint,
    read_checkpoint,
    run_folder,
    save_checkpoint_file,
)
from wys_nerfstudio.training.devices import choose_device, choose_implementation, validate_machine
from wys_nerfstudio.training.distributed import (
    PeerMonitor,
    broadcast_from_main,
    convert_lost_rank_errors,
    main_process_only,
    rank,
    shorten_launcher_errors,
)
from wys_nerfstudio.training.interrupts import (
    INTERRUPTED,
    GracefulInterrupt,
    convert_disk_errors,
    exit_on_error,
    report_uncaught_errors,
    resume_hint,
)
from wys_nerfstudio.training.learning_rates import use_typed_rates
from wys_nerfstudio.training.memory import ACTIVITIES, RunActivity, memory_remedies
from wys_nerfstudio.training.option_text import check_path, check_text
from wys_nerfstudio.training.output_folder import claim_folder, claimed_folder
from wys_nerfstudio.training.run_options import check_resumed_options, read_run_config
from wys_nerfstudio.training.run_state import STATE_KEY, RunState, set_random_state
from wys_nerfstudio.training.scene_checks import check_resumed_scene
from wys_nerfstudio.training.settings import RunSettings
from wys_nerfstudio.training.trackers import convert_tracker_errors
from wys_nerfstudio.training.validation import minimum, validate_range, validate_ranges
from wys_nerfstudio.utils.atomic_io import write_text
from wys_nerfstudio.utils.background import BackgroundJob
from wys_nerfstudio.utils.console import keep_output
from wys_nerfstudio.utils.data_checks import check_capture
from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.folder_lock import LOCK_FILE, unlock_folder
from wys_nerfstudio.utils.log_filters import ignore_warnings
from wys_nerfstudio.utils.memory_errors import MemoryExhaustedError, convert_memory_errors
from wys_nerfstudio.utils.recipes import parse_with_recipe
from wys_nerfstudio.viewer.commands import CommandHandler

STEP_OPTIONS = ("steps_per_save", "steps_per_eval_batch", "steps_per_eval_image", "steps_per_eval_all_images")
"""Options of nerfstudio that count steps from one time to the next; 0 is never."""
ELSEWHERE = "start this command in the folder in which the run was started, or correct {} in the run's config.yml."
"""Advice for paths of a finished run that do not exist."""
NEVER = 2**62
"""A step that no run reaches."""


@dataclass
class WysTrainerConfig(TrainerConfig):
    """Options of a run."""

    _target: type = field(default_factory=lambda: WysTrainer)
    pipeline: WysPipelineConfig = field(default_factory=WysPipelineConfig)
    """Scene, data and editing."""
    recipe: Optional[Path] = None
    """YAML file of options, written as typed but without the dashes; options on the command line override it."""
    max_num_iterations: Optional[int] = None  # type: ignore
    """Stop after this many steps in all. Default: at the end of the three phases."""

    def set_timestamp(self) -> None:
        """Resolve and validate all options, before nerfstudio saves config.yml and starts.

        nerfstudio's train script calls this first after parsing, once per run. Errors end the program here with a sentence.
        """
        ignore_warnings()
        keep_output()
        with exit_on_error():
            check_text(self)
            self._resolve()
            check_path("The run's folder", self.get_base_dir())
            self._validate_ranges()
            with self._convert_folder_errors():
                self._create_dated_folder()
        if self.machine.num_devices > 1:
            shorten_launcher_errors()

    def _create_dated_folder(self) -> None:
        """Set the timestamp, unless it is given, to a second in which no other run has started."""
        if self.timestamp != type(self).timestamp:
            return
        while True:
            super().set_timestamp()
            try:
                self.get_base_dir().mkdir(parents=True)
                return
            except FileExistsError:
                self.timestamp = type(self).timestamp
                time.sleep(1 - time.time() % 1)

    def save_config(self) -> None:
        """Claim the run's folder and write config.yml. That of a run that is resumed in its own folder is replaced once nothing can be
        refused any more."""
        folder = self.get_base_dir()
        with exit_on_error(), self._convert_folder_errors():
            claim_folder(folder, self.get_checkpoint_dir(), self.load_checkpoint)
            if self.load_checkpoint is None or not (folder / "config.yml").is_file():
                self.write_config()

    def write_config(self) -> None:
        """Write config.yml atomically."""
        write_text(self.get_base_dir() / "config.yml", yaml.dump(SavedConfig(**vars(self))))

    @contextmanager
    def _convert_folder_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WysError(
                f'The run\'s folder "{self.get_base_dir()}" cannot be written: {error.strerror}. Choose another one with '
                "--output-dir."
            ) from error

    def _validate_ranges(self) -> None:
        """Refuse numbers among nerfstudio's own options that cannot work."""
        validate_ranges("", self, {"max_num_iterations": 1, **minimum(0, *STEP_OPTIONS)})
        validate_ranges("logging.", self.logging, minimum(1, "steps_per_log", "max_buffer_size"))
        validate_ranges("logging.local-writer.", self.logging.local_writer, minimum(0, "max_log_size"))
        for group, steps in self.gradient_accumulation_steps.items():
            validate_range(f"--gradient-accumulation-steps {group}", steps, 1)
        if not 0 <= self.machine.seed < 2**32:
            raise WysError(f"--machine.seed must be from 0 to {2**32 - 1}, not {self.machine.seed}.")
        validate_machine(self.machine, self.pipeline.editor_device, self.pipeline.edit_count, self.pipeline.edit_every)
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
            # nerfstudio's script has done this to the first parse.
            if self.data is not None:
                self.pipeline.datamanager.data = self.data
        self._take_prompt()
        choose_device(self.method_name, self.machine)
        self.pipeline.model.implementation = choose_implementation(self.pipeline.model.implementation)  # type: ignore
        resumed = self._resolve_load_dir()
        settings = RunSettings.from_options(self.pipeline)
        if resumed is not None:
            settings = resumed.resumed_settings(settings)
        self.pipeline.check(settings)
        self._check_data()
        if self.max_num_iterations is None:
            self.max_num_iterations = self.pipeline.schedule(resumed).total_steps
        if resumed is not None:
            self._refuse_finished(resumed)

    def _check_data(self) -> None:
        manager = self.pipeline.datamanager
        data = manager.data or manager.dataparser.data
        if not data.exists():
            raise WysError(f'There is no data at "{data}": give --data a folder of captured views.')
        check_capture(data, manager.dataparser)

    def _take_prompt(self) -> None:
        """Take nerfstudio's own --prompt as the instruction."""
        if self.prompt is None:
            return
        if self.pipeline.instruction and self.pipeline.instruction != self.prompt:
            raise WysError(
                "--prompt and --instruction are the same option and have different values: give one of them."
            )
        self.pipeline.instruction = self.prompt

    def _resolve_load_dir(self) -> Optional[RunState]:
        """Resolve --load-dir: a checkpoint of this method is resumed, one of nerfacto is a base run, as for
        Instruct-NeRF2NeRF. The checkpoint to resume is `load_checkpoint` from here on.

        Returns:
            State of the run that is resumed; None without.
        """
        given = self.load_checkpoint or self.load_dir
        if given is None:
            return None
        path = find_checkpoint(given, "--load-dir", self.load_step)
        # Not load_step: config.yml would make ns-eval evaluate that step, too.
        self.load_dir, self.load_step, self.load_checkpoint = None, None, path
        checkpoint = read_checkpoint(path)
        if is_wys(checkpoint):
            # The resumed run has a scene already.
            self.pipeline.base_run = None
            state = RunState.from_checkpoint(checkpoint, path)
            if not checkpoint.keys() >= {"optimizers", "schedulers", "scalers"}:
                raise WysError(
                    f'The run cannot be resumed from "{path}", which contains no optimizers. Give it to --base-run instead, '
                    "to start a new edit from its scene."
                )
            folder = run_folder(path)
            check_resumed_options(folder, read_run_config(folder), self)
            return state
        if self.pipeline.base_run is not None:
            raise WysError("--load-dir names a nerfacto run and --base-run is given too: give one of them.")
        CONSOLE.print(f'"{path.parent}" is not a wys run: it is used as the base, as with --base-run.', markup=False)
        self.pipeline.base_run, self.load_checkpoint = path, None
        return None

    def _refuse_finished(self, resumed: RunState) -> None:
        """Refuse to resume a finished run, unless a viewer can apply other instructions to it."""
        assert self.max_num_iterations is not None
        done = resumed.step + 1
        finished = done >= self.max_num_iterations or resumed.history[-1]["start"] == "reset"
        if finished and (not self.is_viewer_enabled() or self.viewer.quit_on_train_completion):
            raise WysError(
                f"The run is finished: it has {done} of {self.max_num_iterations} steps. For more editing raise "
                "--pipeline.edit-steps; for another edit give this run to --base-run."
            )


class SavedConfig(WysTrainerConfig):
    """Options of a run in its config.yml, from which nerfstudio's other commands load it."""

    @property
    def viewer(self) -> ViewerConfig:  # type: ignore
        """Options of the viewer."""
        return vars(self)["viewer"]

    @viewer.setter
    def viewer(self, options: ViewerConfig) -> None:
        """Take options of the viewer. ns-viewer replaces the run's by its own, which open a port to the network by default: the host
        stays the run's unless one is typed."""
        typed = any(word.replace("_", "-").startswith("--viewer.websocket-host") for word in sys.argv)
        if "viewer" in vars(self) and not typed:
            options.websocket_host = self.viewer.websocket_host
        vars(self)["viewer"] = options

    def get_checkpoint_dir(self) -> Path:
        """Return the folder of checkpoints, after choosing the newest undamaged one.

        nerfstudio (1.1.5) calls this right before it loads the newest checkpoint, whatever that contains.
        """
        folder = super().get_checkpoint_dir()
        data = self.pipeline.datamanager.data or self.pipeline.datamanager.dataparser.data
        report_uncaught_errors()
        with exit_on_error():
            if newest_checkpoint(folder) is None:
                raise WysError(f'No checkpoint found in "{folder}": {ELSEWHERE.format("output_dir")}')
            if not data.exists():
                raise WysError(f'There is no data at "{data}": {ELSEWHERE.format("data")}')
            self.load_step = read_checkpoint(find_checkpoint(folder, "--load-config", self.load_step))["step"]
        return folder

    def set_timestamp(self) -> None:
        """Start a run with these options: ns-train's --load-config."""
        self.__class__ = WysTrainerConfig  # type: ignore
        self.set_timestamp()


class WysTrainer(Trainer):
    """nerfstudio's trainer, with a total number of steps that commands of the viewer can change.

    Args:
        config: Options of the run.
        local_rank: Number of this process.
        world_size: Number of processes.
    """

    config: WysTrainerConfig
    pipeline: WysPipeline  # type: ignore
    last_step: int
    """Last step of the run; it moves when instructions are applied and undone."""

    def __init__(self, config: WysTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        super().__init__(config, local_rank, world_size)
        if torch.device(self.device).type == "cuda":
            # Otherwise NCCL and everything on "cuda" would use the first GPU in all processes.
            torch.cuda.set_device(self.device)
        self._writing = BackgroundJob()
        self._bad_step: Optional[torch.Tensor] = None
        """First step with a loss that is NaN or infinite, on the training device; `NEVER` if there was none."""

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Build pipeline and viewer, before the first step."""
        CONSOLE.quiet = rank() > 0
        keep_output()  # for the other processes of several GPUs
        try:
            with (
                exit_on_error(),
                convert_disk_errors(self.base_dir),
                convert_lost_rank_errors(),
                convert_tracker_errors(),
                self.convert_memory_errors("preparation"),
            ):
                self._peers = PeerMonitor()
                super().setup(test_mode)
                after_training = [TrainingCallbackLocation.AFTER_TRAIN]
                self.callbacks.append(TrainingCallback(after_training, self._write_contact_sheet))
                if self.config.load_checkpoint is not None:
                    main_process_only(self.config.write_config)()
        except SystemExit:
            self._remove_empty_run()
            raise

    @main_process_only
    def _remove_empty_run(self) -> None:
        """Remove the folder of a run that did not start, if it contains only config.yml."""
        unlock_folder(self.base_dir)
        if self.base_dir.is_dir() and {path.name for path in self.base_dir.iterdir()} <= {"config.yml", LOCK_FILE}:
            for path in self.base_dir.iterdir():
                path.unlink()
            for folder in (self.base_dir, *self.base_dir.parents):
                if folder == self.config.output_dir or any(folder.iterdir()):
                    return
                folder.rmdir()

    def train(self) -> None:
        """Train the remaining steps of the run, then carry out the viewer's commands until it is closed.

        nerfstudio's own loop (1.1.5) counts `max_num_iterations` from the resumed step, has a fixed end, and processes no
        commands while it is paused.
        """
        assert self.config.max_num_iterations is not None
        self.step, self.last_step, self.stop_training = self._start_step - 1, self.config.max_num_iterations - 1, False
        self._paused = self._interrupted = self._stopped = False
        with (
            claimed_folder(self.base_dir),
            exit_on_error(),
            convert_disk_errors(self.base_dir),
            convert_lost_rank_errors(),
            self.convert_memory_errors("training"),
            GracefulInterrupt() as self._interrupts,
            self._peers,
        ):
            self._commands = CommandHandler(self)
            if self._commands.was_reset:
                self.last_step = self.step
            if self._left() <= 0:
                self._reopen()
            self._started = self.step
            self._save_transform()
            self._init_viewer_state()
            random = self.pipeline.resumed and self.pipeline.resumed[0].random_of_this_rank()
            if random is not None:
                set_random_state(random)
            self._sync()
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
            self._sync()

    def _sync(self) -> None:
        """Carry out commands and take over the training state of rank 0, which has the viewer."""
        self._commands.run_commands(self.step)
        self._paused, self._interrupted, shut_down = broadcast_from_main(
            lambda: (self.training_state == "paused", self._interrupts.received, self.stop_training)
        )
        self._stopped = self._interrupted or shut_down

    @contextmanager
    def convert_memory_errors(self, activity: RunActivity) -> Iterator[None]:
        """Convert errors of memory that ran out to a `MemoryExhaustedError` that names the options to change.

        Args:
            activity: What the run does.
        """

        def remedy() -> str:
            config = self.config
            phase = None if activity == "preparation" else self.pipeline.session.phase
            found = memory_remedies(
                activity, phase, config.method_name, config.pipeline, config.machine.device_type == "cuda"
            )
            resumable = newest_checkpoint(self.checkpoint_dir) is not None
            return f"try {' or '.join(found)}" + (f"; {resume_hint(self.base_dir)}" if resumable else ".")

        with convert_memory_errors(ACTIVITIES[activity], remedy):
            yield

    @main_process_only
    def _save_transform(self) -> None:
        outputs = self.pipeline.datamanager.train_dataparser_outputs
        outputs.save_dataparser_transform(self.base_dir / "dataparser_transforms.json")

    def _stop_here(self) -> NoReturn:
        """Save the run and print how to resume it."""
        self.shutdown()
        sentence = "Stopped before the first step; there is nothing to save."
        if self.step > self._started:
            self.save_checkpoint(self.step)
            sentence = f"Stopped after step {self.step}; {resume_hint(self.base_dir)}"
        if rank() == 0:
            print(f"wys: {sentence}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)

    def _watch_loss(self, step: int, loss: torch.Tensor) -> None:
        """Record the first step with a loss that is NaN or infinite. Not read at once: that would wait for the GPU."""
        bad = torch.where(loss.detach().isfinite(), NEVER, step)
        self._bad_step = bad if self._bad_step is None else torch.minimum(self._bad_step, bad)

    def _check_loss(self) -> None:
        """Stop training, without saving, if a loss was NaN or infinite."""
        if self._bad_step is not None and int(self._bad_step) < NEVER:
            self._stop_at_nan(int(self._bad_step), "The loss")

    def _check_finite(self, step: int, what: str, *values: torch.Tensor) -> None:
        """Stop training, without saving, if a value is NaN or infinite."""
        if not all(bool(value.isfinite().all()) for value in values):
            self._stop_at_nan(step, what)

    def _stop_at_nan(self, step: int, what: str) -> NoReturn:
        self.finish_writes()
        good = newest_checkpoint(self.checkpoint_dir)
        self.shutdown()
        raise WysError(
            f"{what} became NaN or Inf at step {step}: training stops and saves nothing. "
            + (f'The last good checkpoint is "{good}"; ' if good else "There is no checkpoint yet; ")
            + "try lower learning rates, such as --optimizers.fields.optimizer.lr 0.001"
            + (f', and --load-dir "{good}".' if good else ".")
        )

    def _train_step(self, step: int) -> None:
        """Train one step, with everything that nerfstudio does around it."""
        self.step = step
        # Without the lock: maps take long and do not touch the scene, so the viewer may render meanwhile.
        session = self.pipeline.session
        try:
            with self.convert_memory_errors("relevance maps"):
                session.prepare_relevance(session.schedule.phase(step))
        except MemoryExhaustedError as error:
            self.step = step - 1
            if not self._commands.undo_failed_apply(self.step, error):
                raise
            return
        logged = step_check(step, self.config.logging.steps_per_log, run_at_zero=True)
        if logged or session.edits_due(step):  # an edit of a scene of NaN would be blamed on the editor
            self._check_loss()
        with self.train_lock, TimeWriter(writer, EventName.ITER_TRAIN_TIME, step=step) as timer:
            self.pipeline.train()
            with self.convert_memory_errors("edits"):
                for callback in self.callbacks:
                    callback.run_callback_at_location(step, location=TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
            loss, losses, metrics = self.train_iteration(step)
            self._watch_loss(step, loss)
            for callback in self.callbacks:
                callback.run_callback_at_location(step, location=TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        if step > 1:  # the first ones are slow
            rays = self.pipeline.datamanager.get_train_rays_per_batch()
            rate = self.world_size * rays / max(0.001, timer.duration)
            writer.put_time(EventName.TRAIN_RAYS_PER_SEC, rate, step=step, avg_over_steps=True)
        self._update_viewer_state(step)
        if logged:
            writer.put_scalar("Train Loss", loss, step)
            writer.put_dict("Train Loss Dict", losses, step)
            writer.put_dict("Train Metrics Dict", metrics, step)
            writer.put_scalar("GPU Memory (MB)", torch.cuda.max_memory_allocated() / 2**20, step)
        if self.pipeline.datamanager.eval_dataset:
            with self.train_lock, self.convert_memory_errors("renders"):
                self.eval_iteration(step)
        if step_check(step, self.config.steps_per_save):
            self.save_checkpoint(step, beside_training=True)
        self.finish_writes(wait=False)
        writer.write_out_storage()

    def _reopen(self) -> None:
        """Show a finished run, so that other instructions can be applied to it."""
        session = self.pipeline.session
        phase = session.schedule.phase(self.step)
        with self.convert_memory_errors("relevance maps"):
            session.prepare_relevance(phase)
        with self.train_lock, self.convert_memory_errors("edits"):
            session.enter_phase(phase)
        self._init_viewer_state()
        self._train_complete_viewer()

    def set_total_steps(self, steps: int, paused: bool = False) -> None:
        """Move the end of the run.

        Args:
            steps: Steps of the whole run.
            paused: Wait for Resume Training in the viewer.
        """
        self.last_step = steps - 1
        paused = paused and self._left() > 0
        self.training_state = "paused" if paused else "training"
        if isinstance(self.viewer_state, Viewer):
            self.viewer_state.pause_train.visible = not paused
            self.viewer_state.resume_train.visible = paused

    def redraw(self) -> None:
        """Make the viewer render the scene again, interrupting the current render."""
        if isinstance(self.viewer_state, Viewer):
            with suppress(KeyError):  # as below
                self.viewer_state._trigger_rerender()

    def hide_cameras(self) -> None:
        """Hide the training cameras in the viewer, as its button does."""
        if isinstance(self.viewer_state, Viewer):
            self.viewer_state.set_camera_visibility(False)
            self.viewer_state.hide_images.visible, self.viewer_state.show_images.visible = False, True

    def _update_viewer_state(self, step: int) -> None:
        # nerfstudio iterates over a copy of its clients; one that has left since raises KeyError.
        with suppress(KeyError):
            super()._update_viewer_state(step)

    def _train_complete_viewer(self) -> None:
        """Wait for commands until the viewer is closed."""
        if not self.config.is_viewer_enabled():
            return
        if isinstance(self.viewer_state, Viewer):
            self.viewer_state.training_complete()
        CONSOLE.print("Use ctrl+c to quit", justify="center")
        while self._left() <= 0 and not self._stopped:
            self.training_state = "completed"
            time.sleep(0.02)
            self._sync()

    def _after_train(self) -> None:
        """Finish the run, before the last checkpoint marks it as finished."""
        self.pipeline.session.finish(self.step)
        super()._after_train()

    def _write_contact_sheet(self, step: int) -> None:
        """Collective: write the contact sheet of the finished run, unless the run is interrupted. All else is saved by now.

        Args:
            step: The last trained step; nerfstudio calls this after training.
        """
        session, interrupts = self.pipeline.session, self._interrupts
        saved = f'the run is finished and saved; wys compare "{self.base_dir}" renders a contact sheet.'
        # The viewer renders in other threads, and a training view is rendered with its own appearance.
        with self.train_lock, convert_memory_errors(ACTIVITIES["renders"], lambda: saved):
            written = broadcast_from_main(
                lambda: session.edit_loop.write_contact_sheet(session.run.folder, lambda: interrupts.received)
            )
        if not written:
            self.shutdown()
            if rank() == 0:
                print(f"wys: Stopped before the contact sheet was written: {saved}", file=sys.stderr)
            raise SystemExit(INTERRUPTED)

    def _load_checkpoint(self) -> None:
        """Load weights, optimizers and state of the run that is resumed."""
        path = self.config.load_checkpoint
        if path is None:
            return
        checkpoint = read_checkpoint(path)
        self._start_step = checkpoint["step"] + 1
        state = RunState.from_checkpoint(checkpoint, path)
        self.pipeline.datamanager.check_views(state.views)
        check_resumed_scene(path, checkpoint, self.pipeline.scene_model)
        self.pipeline.load_pipeline(checkpoint["pipeline"], checkpoint["step"])
        self.pipeline.resume(state, path)
        self.optimizers.load_optimizers(checkpoint["optimizers"])
        if self.config.load_scheduler:
            self.optimizers.load_schedulers(checkpoint["schedulers"])
        use_typed_rates(self.optimizers, self.config.optimizers)
        if checkpoint["scalers"]:  # empty after full precision; mixed precision then starts with a new scale
            self.grad_scaler.load_state_dict(checkpoint["scalers"])

    def save_checkpoint(self, step: int, beside_training: bool = False) -> None:
        """Collective: save weights, optimizers, edited views and the run's state in one file, so that a run which is killed at any
        moment has a checkpoint of one step.

        Args:
            step: The last trained step.
            beside_training: Return once everything is copied, and write the files while training continues.
        """
        self.finish_writes()
        self._check_loss()
        pipeline, session, optimizers = self.pipeline, self.pipeline.session, self.optimizers
        self._check_finite(step, "A weight", *(value.detach() for value in pipeline.parameters()))
        state = session.state(step).data()
        if rank() > 0:
            return
        session.history.write()
        checkpoint = {
            "step": step,
            "pipeline": copy_to_cpu(pipeline.weights()),
            "optimizers": copy_to_cpu({name: o.state_dict() for name, o in optimizers.optimizers.items()}),
            "schedulers": copy_to_cpu({name: s.state_dict() for name, s in optimizers.schedulers.items()}),
            "scalers": self.grad_scaler.state_dict(),
            STATE_KEY: state,
        }

        def write() -> None:
            session.write_images(state["views"])
            save_checkpoint_file(self.checkpoint_dir, checkpoint, self.config.save_only_latest_checkpoint)

        self._writing.start(write)
        if not beside_training:
            self.finish_writes()

    def finish_writes(self, wait: bool = True) -> None:
        """Finish saving: once a checkpoint is written, files that only earlier ones needed are removed.

        Args:
            wait: Wait for files that are being written; otherwise they are finished if they are ready.
        """
        if self._writing.ended(wait):
            self.pipeline.session.history.prune()
