"""The panel in the viewer: it shows what a run is doing and takes requests. It decides nothing.

The viewer calls back from threads of its own. A callback only puts a request into a queue, which the trainer empties
between steps; the mask threshold is a number that the model reads, so it is set at once and the scene is drawn again.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, Optional

import numpy as np
import viser
import viser.transforms as vtf
from jaxtyping import Float
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO
from nerfstudio.viewer.viewer_elements import ViewerElement
from PIL import Image
from torch import Tensor

from wys_nerfstudio.utils.visualization import to_uint8

ON_TOP, INSTEAD = "on top", "instead"
"""Where an applied instruction starts from: the scene as it is now, or as it was captured."""

LIVE_SETTINGS = (
    "mask_threshold",
    "guidance_scale",
    "image_guidance_scale",
    "localization",
    "edit_every",
    "edit_count",
)
"""Options of the pipeline that can be changed while it runs."""


@dataclass(frozen=True)
class ViewerCommand:
    """Something that was asked for."""

    action: Literal["set", "pause", "apply", "preview", "undo", "reset"]
    """What to do: change a setting, pause or go on editing, ..."""
    name: str = ""
    """The setting; for "apply" the start, `ON_TOP` or `INSTEAD`; for "preview" the instruction, the run's if empty."""
    value: Any = None
    """Its value; for "apply" the instruction, for "preview" the camera's position and direction, six numbers."""


class ViewerPanel(ViewerElement[None]):
    """The panel. nerfstudio sorts elements by their attribute's name, so this one element installs all of them, in order.

    Args:
        instruction: What is being applied.
        settings: Present values of `LIVE_SETTINGS`.
        localizations: Choices of the localisation.
        live: Whether there is a run that can be steered; if not, only the threshold is shown.
        set_threshold: Called with the threshold when the slider moves, at once.
    """

    def __init__(
        self,
        instruction: str,
        settings: dict[str, Any],
        localizations: Sequence[str],
        live: bool,
        set_threshold: Callable[[float], None],
    ) -> None:
        super().__init__("Watch Your Steps")
        self.requests: SimpleQueue[ViewerCommand] = SimpleQueue()
        """What was asked for and not yet taken."""
        self._instruction = instruction
        self._settings = settings
        self._localizations = localizations
        self._live = live
        self._set_threshold = set_threshold
        self._status: Optional[viser.GuiMarkdownHandle] = None
        self._preview: Optional[viser.GuiMarkdownHandle] = None
        self._handles: dict[str, viser.GuiInputHandle[Any]] = {}

    def install(self, viser_server: viser.ViserServer) -> None:
        """Builds the panel; nerfstudio calls this when the viewer starts."""
        gui, settings = viser_server.gui, self._settings
        with gui.add_folder(self.name):
            if not self._live:
                self._add_threshold(gui)
                return
            self._status = gui.add_markdown("starting")
            self._handles["instruction"] = gui.add_text("Instruction", self._instruction)
            # Two buttons: of a group, viser 0.2 passes on only clicks that change the group's value.
            on_top = gui.add_button("Apply on top", hint="Edit the scene as it is now")
            on_top.on_click(lambda event: self._put(event, "apply", ON_TOP, self._value("instruction")))
            instead = gui.add_button("Apply instead", hint="Start again from the captured scene")
            instead.on_click(lambda event: self._put(event, "apply", INSTEAD, self._value("instruction")))
            self._add_threshold(gui)
            self._add("guidance_scale", gui.add_number("Guidance scale", settings["guidance_scale"], min=0.0, step=0.1))
            self._add(
                "image_guidance_scale",
                gui.add_number("Image guidance scale", settings["image_guidance_scale"], min=0.0, step=0.1),
            )
            self._add(
                "localization",
                gui.add_dropdown("Localization", self._localizations, initial_value=settings["localization"]),
            )
            self._add("edit_every", gui.add_number("Edit every", settings["edit_every"], step=1))
            self._add("edit_count", gui.add_number("Edit count", settings["edit_count"], step=1))
            pause = gui.add_checkbox("Pause editing", False, hint="Train on, but edit no further views")
            pause.on_update(lambda event: self._put(event, "pause", value=pause.value))
            preview = gui.add_button("Preview", hint="Edit the training view nearest to the camera, without using it")

            def preview_clicked(event: viser.GuiEvent) -> None:
                camera = event.client and camera_of(event.client)
                self._put(event, "preview", self._value("instruction"), camera)

            preview.on_click(preview_clicked)
            self._preview = gui.add_markdown("")
            undo = gui.add_button("Undo", hint="Return to the moment before the last Apply or Reset")
            undo.on_click(lambda event: self._put(event, "undo"))
            reset = gui.add_button("Reset", hint="Return to the captured scene")
            reset.on_click(lambda event: self._put(event, "reset"))

    def _add_threshold(self, gui: viser.GuiApi) -> None:
        slider = gui.add_slider("Mask threshold", 0.0, 1.0, step=0.01, initial_value=self._settings["mask_threshold"])

        def redraw(event: viser.GuiEvent) -> None:
            self._set_threshold(slider.value)
            self._put(event, "set", "mask_threshold", slider.value)
            self.cb_hook(self)  # nerfstudio's own: draws the scene again

        slider.on_update(redraw)
        self._handles["mask_threshold"] = slider

    def _add(self, name: str, handle: "viser.GuiInputHandle[Any]") -> None:
        handle.on_update(lambda event: self._put(event, "set", name, handle.value))
        self._handles[name] = handle

    def _put(
        self,
        event: viser.GuiEvent,
        action: Literal["set", "pause", "apply", "preview", "undo", "reset"],
        name: str = "",
        value: Any = None,
    ) -> None:
        # Without a client it was this program that changed the value.
        if event.client is not None and self._live:
            self.requests.put(ViewerCommand(action, name, value))

    def _value(self, name: str) -> Any:
        return self._handles[name].value

    # ------------------------------------------------------------------------------------------- from the training loop

    def take(self) -> Optional[ViewerCommand]:
        """What was asked for first and has not been taken yet, if anything."""
        return None if self.requests.empty() else self.requests.get()

    def show_status(self, text: str) -> None:
        """Shows Markdown in the status line."""
        if self._status is not None and self._status.content != text:
            self._status.content = text

    def show_settings(self, instruction: str, settings: dict[str, Any]) -> None:
        """Shows what is really in force, for instance after a value was refused. What is being typed as the next instruction
        stays, unless the run's has changed."""
        shown = settings if instruction == self._instruction else {"instruction": instruction, **settings}
        self._instruction = instruction
        for name, value in shown.items():
            handle = self._handles.get(name)
            if handle is not None and handle.value != value:
                handle.value = value

    def show_preview(self, caption: str, pictures: Sequence[Float[Tensor, "h w 3"]]) -> None:
        """Shows pictures side by side under the Preview button."""
        if self._preview is None:
            return
        strip = np.concatenate([to_uint8(picture) for picture in pictures], axis=1)
        buffer = io.BytesIO()
        Image.fromarray(strip).save(buffer, format="PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        # viser 0.2 has no image element, but its Markdown takes pictures inline.
        self._preview.content = f"{caption}\n\n![preview](data:image/png;base64,{encoded})"


def camera_of(client: viser.ClientHandle) -> tuple[float, ...]:
    """Position and direction of view of a client's camera, in the scene's coordinates."""
    position = np.asarray(client.camera.position) / VISER_NERFSTUDIO_SCALE_RATIO
    direction = vtf.SO3(np.asarray(client.camera.wxyz)).as_matrix()[:, 2]
    return (*map(float, position), *map(float, direction))
