"""The options that can change during a run, and their only owner."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Optional

from wys_nerfstudio.editing import EditOptions
from wys_nerfstudio.editing.editor import EditDefaults
from wys_nerfstudio.relevance.localizer import Localization, Localizer
from wys_nerfstudio.training.validation import validate_range
from wys_nerfstudio.utils.errors import WysError


@dataclass(frozen=True)
class RunSettings:
    """Values of the options that can change during a run; the names are those of the pipeline's options."""

    instruction: str
    """What to change."""
    mask_threshold: float
    """Pixels of at least this relevance are edited (tau)."""
    guidance_scale: Optional[float]
    """How strongly edits follow the instruction (S_T); None, the editor's default, only where nothing is edited."""
    image_guidance_scale: Optional[float]
    """How strongly edits keep to the captured view (S_I); None as for `guidance_scale`."""
    localization: Localization
    """What confines the edits."""
    edit_every: int
    """Steps from one edit to the next."""
    edit_count: int
    """Views that are edited together."""

    @staticmethod
    def from_options(options: Any, defaults: Optional[EditDefaults] = None) -> "RunSettings":
        """Return the settings that a run starts with.

        Args:
            options: An object with this class's fields as attributes, such as the pipeline's config.
            defaults: The editor's, for options that are None; None where nothing is edited.
        """
        values: dict[str, Any] = {option.name: getattr(options, option.name) for option in fields(RunSettings)}
        if defaults is not None:
            known = asdict(defaults)
            values = {name: known[name] if value is None else value for name, value in values.items()}
        return RunSettings(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)

    def validate(self) -> None:
        """Refuse values that cannot work, under the names that the viewer's panel shows.

        Raises:
            WysError: For the first such value.
        """
        EditOptions(
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            mask_threshold=self.mask_threshold,
        ).check(label)
        for option in ("edit_every", "edit_count"):
            validate_range(label(option), getattr(self, option), 1)


def label(name: str) -> str:
    """Return the name of a setting as the viewer's panel shows it."""
    return name.replace("_", " ").capitalize()


class Settings:
    """Owner of a run's settings. Observers receive every new value.

    Args:
        values: Initial values.
        localizations: Localizations that the run can switch between.
        check: Refuses values that the run's editor does not support.
    """

    def __init__(
        self,
        values: RunSettings,
        localizations: Sequence[Localization],
        check: Callable[[RunSettings], None] = lambda values: None,
    ) -> None:
        self.localizations = tuple(localizations)
        self._check = check
        self._current = values
        self._observers: list[Callable[[RunSettings], None]] = []

    @property
    def current(self) -> RunSettings:
        """The values in force. The object is immutable: read it once for work that must not see two values."""
        return self._current

    def subscribe(self, observer: Callable[[RunSettings], None]) -> None:
        """Call a function now and after each change with the values in force."""
        self._observers.append(observer)
        observer(self._current)

    def update(self, **changes: Any) -> None:
        """Change settings.

        Args:
            **changes: New values by name.

        Raises:
            WysError: If a value cannot work; nothing changes then.
        """
        values = replace(self._current, **changes)
        values.validate()
        self._check(values)
        if values.localization not in self.localizations:
            raise WysError(
                f"Localization {values.localization} is not available in this run; choose {' or '.join(self.localizations)}."
            )
        self.load(values)

    def load(self, values: RunSettings) -> None:
        """Put all values in force, for instance those of a checkpoint."""
        self._current = values
        for observer in self._observers:
            observer(values)

    def localizer(self, maps: Any) -> Localizer:
        """Return where views may change under the values in force.

        Args:
            maps: As in `Localizer`.
        """
        return Localizer(self._current.localization, self._current.mask_threshold, maps)
