"""nerfstudio's trainer, taught three things: recipes and checks before anything starts, resuming by total steps, and
errors that are sentences instead of tracebacks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import tyro
import yaml
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.checkpoint import find_checkpoint, is_wys, read_checkpoint
from wys_nerfstudio.errors import WysError
from wys_nerfstudio.pipeline import WysPipeline, WysPipelineConfig


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
        with errors_as_sentences():
            self._resolve()
        super().set_timestamp()

    def _resolve(self) -> None:
        if self.recipe is not None:
            self._take_recipe(self.recipe)
        self._take_prompt()
        self._choose_device()
        self._take_load_dir()
        self.pipeline.check()
        data = self.pipeline.datamanager.data
        if data is not None and not data.exists():
            raise WysError(f'There is no data at "{data}": give --data a folder of captured views.')
        if self.max_num_iterations is None:
            self.max_num_iterations = self.pipeline.plan().total_steps

    def _take_recipe(self, recipe: Path) -> None:
        """Parses the command line again with the recipe's options in front: of two equal options the later one counts."""
        from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

        method, typed = sys.argv[1:2], sys.argv[2:]
        if method != [self.method_name]:
            raise WysError("--recipe is an option of ns-train's command line; from Python set the options themselves.")
        options = recipe_arguments(recipe)
        union: Any = AnnotatedBaseConfigUnion
        try:
            tyro.cli(union, args=[*method, *options], console_outputs=False)
        except SystemExit as error:
            raise WysError(
                f'The recipe "{recipe}" has an option that ns-train {self.method_name} does not know, or a value that does '
                f"not fit it: {' '.join(options)}. See ns-train {self.method_name} --help."
            ) from error
        parsed = tyro.cli(union, args=[*method, *options, *typed])
        for option in fields(self):
            setattr(self, option.name, getattr(parsed, option.name))
        # What nerfstudio's script had done to the first parse.
        if self.data is not None:
            self.pipeline.datamanager.data = self.data

    def _take_prompt(self) -> None:
        """nerfstudio's own --prompt means the instruction here, as its users expect."""
        if self.prompt is None:
            return
        if self.pipeline.instruction and self.pipeline.instruction != self.prompt:
            raise WysError("--prompt and --instruction mean the same and say different things here: give one of them.")
        self.pipeline.instruction = self.prompt

    def _choose_device(self) -> None:
        if self.machine.device_type == "cuda" and not torch.cuda.is_available():
            self.machine.device_type = "cpu"
            CONSOLE.print(
                "No CUDA device was found: running on the CPU. Try ns-train wys-tiny for a size that suits it."
            )
        model = self.pipeline.model
        if model.implementation == "tcnn":
            from nerfstudio.utils.external import TCNN_EXISTS

            if not TCNN_EXISTS:
                model.implementation = "torch"
                CONSOLE.print("tiny-cuda-nn is not installed: nerfstudio's torch encodings are used, which are slower.")

    def _take_load_dir(self) -> None:
        """A checkpoint of this method is resumed; one of nerfacto is a base, as Instruct-NeRF2NeRF's users type it."""
        if self.load_dir is None:
            return
        checkpoint = find_checkpoint(self.load_dir, "--load-dir")
        self.load_dir = checkpoint.parent
        if is_wys(read_checkpoint(checkpoint)):
            self.pipeline.resume_from = checkpoint.parent.parent
            self.pipeline.adopt_resumed_run()
            return
        if self.pipeline.base_run is not None:
            raise WysError("--load-dir holds a nerfacto run and --base-run is given too: give one of them.")
        CONSOLE.print(f'"{self.load_dir}" is no wys run: it is taken as the base, as with --base-run.')
        self.pipeline.base_run, self.load_dir = checkpoint.parent, None


def recipe_arguments(recipe: Path) -> list[str]:
    """A recipe file as command line arguments.

    Raises:
        WysError: If the file is not there, or is no flat mapping of options to values.
    """
    try:
        content = yaml.safe_load(recipe.read_text("utf8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WysError(f'The recipe "{recipe}" cannot be read: give --recipe a YAML file.') from error
    except yaml.YAMLError as error:
        raise WysError(f'The recipe "{recipe}" is no valid YAML: {str(error).splitlines()[0]}.') from error
    if not isinstance(content, dict) or not all(isinstance(v, (str, int, float, bool)) for v in content.values()):
        raise WysError(f'The recipe "{recipe}" must be lines of "option: value", for instance "mask-threshold: 0.5".')
    arguments: list[str] = []
    for option, value in content.items():
        arguments += [f"--{option}", str(value)]
    return arguments


class WysTrainer(Trainer):
    """nerfstudio's trainer with the total number of steps as its measure."""

    config: WysTrainerConfig
    pipeline: WysPipeline  # type: ignore

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """As nerfstudio's; what fails here fails before the first step."""
        with errors_as_sentences():
            super().setup(test_mode)

    def train(self) -> None:
        """Trains what is left of the run. nerfstudio 1.1.5 counts `max_num_iterations` from the resumed step on."""
        total = self.config.max_num_iterations
        assert total is not None
        left = total - self._start_step
        with errors_as_sentences():
            if left <= 0:
                raise WysError(
                    f"The run is through: it has {self._start_step} of {total} steps. For more editing raise "
                    "--pipeline.edit-steps; for another edit give this run to --base-run."
                )
            self.config.max_num_iterations = left
            try:
                super().train()
            finally:
                self.config.max_num_iterations = total

    def save_checkpoint(self, step: int) -> None:
        """Saves the weights and, to the same moment, the edited views and the run's state."""
        super().save_checkpoint(step)
        if self.local_rank == 0:
            self.pipeline.save_run_state(step)


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Ends the program with the sentence of a `WysError` and exit code 1."""
    try:
        yield
    except WysError as error:
        raise SystemExit(f"wys: {error}") from error
