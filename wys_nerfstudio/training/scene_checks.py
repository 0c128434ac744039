"""Checks that the weights of another run, of a base run or of the run that is resumed, are a scene of this run's model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wys_nerfstudio.training.checkpoint import check_backend, model_state, run_folder
from wys_nerfstudio.training.run_options import SHAPE_OPTIONS, UNSEEN_OPTIONS, differing_flags, read_run_config
from wys_nerfstudio.utils.errors import WysError


@dataclass(frozen=True)
class SavedScene:
    """The weights of a run, and how error messages name it."""

    run: str
    """The run as the subject of a sentence."""
    weights: dict[str, Tensor]
    """Result of `model_state`."""
    config: dict[str, Any]
    """Result of `read_run_config`."""
    remedy: str
    """What to do if no option of the run explains a difference."""

    def check(self, model: nn.Module, keys: Iterable[str]) -> None:
        """Compare the weights with a model.

        Args:
            model: A `WysModel`.
            keys: Keys of the weights, or of the model's, that are compared.

        Raises:
            WysError: If keys, shapes or the meaning of the weights differ.
        """
        compared, current = set(keys), model.state_dict()
        self._check_keys(compared, current, model)
        self._check_shapes(compared, current, model)
        self._check_buffers(compared, current)
        unseen = differing_flags(self.config, model.config, UNSEEN_OPTIONS)
        if unseen:
            raise WysError(f"{self.run} has other settings than this run: add {' '.join(unseen)}.")

    def other_views(self, theirs: int, current: int) -> WysError:
        """Return the error for another number of views."""
        return WysError(
            f"{self.run} was trained on {theirs} views and this data has {current}: use the same --data and the same "
            "dataparser options as that run."
        )

    def _check_keys(self, compared: set[str], current: dict[str, Tensor], model: nn.Module) -> None:
        different = sorted(key for key in compared if (key in current) != (key in self.weights))
        if not different:
            return
        if any(key.startswith("field.mlp_base.") for key in self.weights):  # a scene, not one of another method
            check_backend(self.run, self.weights, current)
        where = "this model" if different[0] in current else "that run"
        raise WysError(
            f"{self.run} is not a scene of this shape: {different[0]} is only in {where}. {self._advice(model)}"
        )

    def _check_shapes(self, compared: set[str], current: dict[str, Tensor], model: nn.Module) -> None:
        # Embeddings first: another number of views has a simpler explanation than another shape.
        for key in sorted(compared, key=lambda key: ("embedding_appearance" not in key, key)):
            theirs, ours = self.weights[key].shape, current[key].shape
            if theirs == ours:
                continue
            if "embedding_appearance" in key and theirs[1:] == ours[1:]:
                raise self.other_views(theirs[0], ours[0])
            raise WysError(
                f"{self.run} is not a scene of this shape: {key} is {tuple(theirs)} there and {tuple(ours)} here. "
                f"{self._advice(model)}"
            )

    def _check_buffers(self, compared: set[str], current: dict[str, Tensor]) -> None:
        """Refuse another maximum resolution and the like: buffers with numbers that shapes do not show."""
        for key in sorted(compared):
            owner, name = key.rpartition(".")[::2]
            if name not in ("max_res", "num_levels", "log2_hashmap_size"):
                continue
            theirs, ours = int(self.weights[key]), int(current[key])
            if theirs != ours:
                option = f"{name.replace('_', '-')} {theirs}" if owner == "field" else "proposal-net-args-list"
                raise WysError(
                    f"{self.run} has {key} {theirs} and this model {ours}: give this run that run's "
                    f"--pipeline.model.{option}."
                )

    def _advice(self, model: nn.Module) -> str:
        flags = differing_flags(self.config, model.config, SHAPE_OPTIONS)
        return f"Give this run that run's settings: {' '.join(flags)}." if flags else self.remedy


def check_resumed_scene(path: Path, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Check that the weights of a run that is resumed are those of a model of this shape, its relevance head included.

    Args:
        path: File of the checkpoint.
        checkpoint: Result of `read_checkpoint`.
        model: A `WysModel`.

    Raises:
        WysError: As for `SavedScene.check`.
    """
    run, weights = run_folder(path), model_state(checkpoint)
    remedy = "Resume it with the options that it was trained with."
    SavedScene(f'The run "{run}"', weights, read_run_config(run), remedy).check(model, {*weights, *model.state_dict()})
