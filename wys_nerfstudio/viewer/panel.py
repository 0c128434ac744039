"""The panel in nerfstudio's viewer: shows the state of a run and queues commands. It carries out nothing itself.

The viewer calls back from threads of its own. A callback puts a command into a queue, which the trainer empties between steps. The
mask threshold also changes at once, so that the mask in the viewer follows the slider.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, Optional

import numpy as np
import viser
import viser.transforms as vtf
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO
from nerfstudio.viewer.viewer_elements import ViewerElement
from PIL import Image
from torch import Tensor

from wys_nerfstudio.training.settings import RunSettings, Settings, label
from wys_nerfstudio.utils.visualization import reduce, to_uint8
from wys_nerfstudio.viewer.server import require_restricted, restrict_viewer

ON_TOP, INSTEAD = "on top", "instead"
"""What an applied instruction starts from: the scene as it is now, or as captured."""

IMAGE_SIDE = 384
"""Largest longer side in pixels of an image in the panel, which is 250 to 350 pixels wide."""

Action = Literal["set", "pause", "apply", "preview", "view", "undo", "reset", "export"]


@dataclass(frozen=True)
class ViewerCommand:
    """A command of the panel."""

    action: Action
    """Change a setting, pause or resume editing, apply an instruction, ..."""
    name: str = ""
    """Name of the setting; for "apply" `ON_TOP` or `INSTEAD`; for "preview" the instruction, the run's if empty."""
    value: Any = None
    """Value of the setting; for "apply" the instruction, for "preview" and "view" the camera's position and direction, six
    numbers."""
    client: Optional[int] = None
    """Number of the viewer's client that sent the command. Not its handle: commands are sent to the other processes."""


class ViewerPanel(ViewerElement[None]):
    """The panel. One element installs all controls, because nerfstudio sorts elements by the names of their attributes.

    Args:
        settings: Settings of the run; the panel shows every change.
        live: Whether there is a run that takes commands; if not, only the threshold is shown.
    """

    def __init__(self, settings: Settings, live: bool) -> None:
        super().__init__("Watch Your Steps")
        restrict_viewer()  # nerfstudio creates the viewer after the pipeline, of which the panel is a part
        self.commands: SimpleQueue[ViewerCommand] = SimpleQueue()
        """Commands that are not taken yet."""
        self._settings = settings
        self._live = live
        self._instruction = settings.current.instruction
        self._status: Optional[viser.GuiMarkdownHandle] = None
        self._server: Optional[viser.ViserServer] = None
        self._images: Optional[viser.GuiMarkdownHandle] = None
        self._handles: dict[str, viser.GuiInputHandle[Any]] = {}
        settings.subscribe(self.show_settings)

    def install(self, viser_server: viser.ViserServer) -> None:
        """Build the panel; nerfstudio calls this when the viewer starts."""
        require_restricted(viser_server)
        self._server = viser_server
        gui, settings = viser_server.gui, self._settings.current
        with gui.add_folder(self.name):
            if not self._live:
                self._add_threshold(gui)
                return
            self._status = gui.add_markdown("starting")
            self._handles["instruction"] = gui.add_text("Instruction", settings.instruction)
            # Two buttons, because viser 0.2 reports only those clicks in a button group that change its value.
            on_top = gui.add_button("Apply on top", hint="Edit the scene as it is now")
            on_top.on_click(lambda event: self._put(event, "apply", ON_TOP, self._value("instruction")))
            instead = gui.add_button("Apply instead", hint="Start again from the captured scene")
            instead.on_click(lambda event: self._put(event, "apply", INSTEAD, self._value("instruction")))
            undo = gui.add_button("Undo", hint="Return to the moment before the last Apply or Reset")
            undo.on_click(lambda event: self._put(event, "undo"))
            reset = gui.add_button("Reset", hint="Return to the captured scene")
            reset.on_click(lambda event: self._put(event, "reset"))
            export = gui.add_button(
                "Export data set", hint="Write the views as they are now into the run's folder, as wys export does"
            )
            export.on_click(lambda event: self._put(event, "export"))
            self._add_threshold(gui)
            for name in ("guidance_scale", "image_guidance_scale"):
                self._add(name, gui.add_number(label(name), getattr(settings, name), min=0.0, step=0.1))
            self._add(
                "localization",
                gui.add_dropdown("Localization", self._settings.localizations, initial_value=settings.localization),
            )
            self._add("edit_every", gui.add_number("Edit every", settings.edit_every, step=1))
            self._add("edit_count", gui.add_number("Edit count", settings.edit_count, step=1))
            pause = gui.add_checkbox("Pause editing", False, hint="Train on, but edit no further views")
            pause.on_update(lambda event: self._put(event, "pause", value=pause.value))
            preview = gui.add_button("Preview", hint="Edit the training view nearest to the camera, without using it")
            preview.on_click(lambda event: self._put_camera(event, "preview", self._value("instruction")))
            nearest = gui.add_button(
                "Nearest training view", hint="Move the camera there, and show it as captured and as edited"
            )
            nearest.on_click(lambda event: self._put_camera(event, "view"))
            self._images = gui.add_markdown("")

    def _add_threshold(self, gui: viser.GuiApi) -> None:
        slider = gui.add_slider(
            "Mask threshold", 0.0, 1.0, step=0.01, initial_value=self._settings.current.mask_threshold
        )

        def redraw(event: viser.GuiEvent) -> None:
            if event.client is not None:
                self._settings.update(mask_threshold=slider.value)
            self._put(event, "set", "mask_threshold", slider.value)
            self.cb_hook(self)  # renders the scene again

        slider.on_update(redraw)
        self._handles["mask_threshold"] = slider

    def _add(self, name: str, handle: "viser.GuiInputHandle[Any]") -> None:
        handle.on_update(lambda event: self._put(event, "set", name, handle.value))
        self._handles[name] = handle

    def _put(
        self,
        event: viser.GuiEvent,
        action: Action,
        name: str = "",
        value: Any = None,
    ) -> None:
        # Without a client this program itself has changed the value.
        if event.client is not None and self._live:
            self.commands.put(ViewerCommand(action, name, value, event.client.client_id))

    def _put_camera(self, event: viser.GuiEvent, action: Action, name: str = "") -> None:
        self._put(event, action, name, event.client and camera_of(event.client))

    def _value(self, name: str) -> Any:
        return self._handles[name].value

    # ------------------------------------------------------------------------------------------- from the training loop

    def take(self) -> Optional[ViewerCommand]:
        """Remove and return the oldest command; None if there is none."""
        return None if self.commands.empty() else self.commands.get()

    def show_status(self, progress: str, message: str = "") -> None:
        """Show the progress of the run, and a message below it if there is one."""
        text = f"**{escape_markdown(progress)}**"
        if message:
            text += f"\n\n*{escape_markdown(message)}*"
        if self._status is not None and self._status.content != text:
            self._status.content = text

    def show_settings(self, settings: RunSettings) -> None:
        """Show the settings in force, for instance after a value was refused. The text of the next instruction stays, unless
        the run's instruction has changed."""
        shown = settings.as_dict()
        if settings.instruction == self._instruction:
            del shown["instruction"]
        self._instruction = settings.instruction
        for name, value in shown.items():
            handle = self._handles.get(name)
            if handle is not None and handle.value != value:
                handle.value = value

    def show_images(self, caption: str, images: Sequence[Float[Tensor, "h w 3"]]) -> None:
        """Show images below each other at the end of the panel: side by side they would be 80 pixels wide."""
        if self._images is None:
            return
        stack = np.concatenate([to_uint8(_fit(image)) for image in images])
        buffer = io.BytesIO()
        Image.fromarray(stack).save(buffer, format="PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        # viser 0.2 has no image element, but its Markdown accepts inline images.
        self._images.content = f"{escape_markdown(caption)}\n\n![training view](data:image/png;base64,{encoded})"

    def move_camera(self, client: int, camera: Cameras) -> None:
        """Move the camera of a client, unless it has left, to a camera of the scene, and show at least its field of view.

        Args:
            client: Number of the client.
            camera: A single camera.
        """
        handle = self._server and self._server.get_clients().get(client)
        if handle is not None:
            move_client(handle, camera)


def _fit(image: Float[Tensor, "h w 3"]) -> Float[Tensor, "some_height some_width 3"]:
    """Return an image reduced to `IMAGE_SIDE`, or enlarged by the largest whole factor that does not exceed it."""
    factor = max(1, IMAGE_SIDE // max(image.shape[:2]))
    return reduce(image, IMAGE_SIDE).repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)


def escape_markdown(text: str) -> str:
    """Return Markdown that shows a text literally, in one line.

    File names, instructions and error messages may come from others, and viser's Markdown is MDX, which can contain
    JavaScript. Unprintable characters, which include the surrogates of undecodable file names, become U+FFFD.
    """
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    # The first character, too: a line that begins with "import" or "export" is code.
    return "".join(char if i and (char.isalnum() or char == " ") else f"&#{ord(char)};" for i, char in enumerate(shown))


def camera_of(client: viser.ClientHandle) -> tuple[float, ...]:
    """Return position and viewing direction of a client's camera, in the scene's coordinates."""
    position = np.asarray(client.camera.position) / VISER_NERFSTUDIO_SCALE_RATIO
    direction = vtf.SO3(np.asarray(client.camera.wxyz)).as_matrix()[:, 2]
    return (*map(float, position), *map(float, direction))


def move_client(client: viser.ClientHandle, camera: Cameras) -> None:
    """Move a client's camera to a camera of the scene, as nerfstudio does when a training camera is clicked. The field of view is the
    smallest one that shows all that the camera shows.

    Args:
        client: The client.
        camera: A single camera.
    """
    pose = camera.camera_to_worlds[0].cpu().numpy()
    down, right = (
        float(side[0] / focal[0] / 2) for side, focal in ((camera.height, camera.fy), (camera.width, camera.fx))
    )
    with client.atomic():
        client.camera.position = pose[:, 3] * VISER_NERFSTUDIO_SCALE_RATIO
        client.camera.wxyz = (vtf.SO3.from_matrix(pose[:, :3]) @ vtf.SO3.from_x_radians(np.pi)).wxyz
        client.camera.fov = 2 * math.atan(max(down, right / client.camera.aspect))
