"""The viewer's panel: file names, instructions and messages are shown literally; images; moves of a client's camera."""

import base64
import io
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import viser
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.viewer import Viewer
from PIL import Image

from wys_nerfstudio.config import wys
from wys_nerfstudio.editing.stable_diffusion import PROFILE
from wys_nerfstudio.training.settings import RunSettings, Settings
from wys_nerfstudio.viewer.panel import IMAGE_SIDE, ViewerPanel, camera_of, escape_markdown

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "{alert(1)}",
    "![x](javascript:alert(1))",
    "![x](/etc/passwd)",
    "[x](javascript:alert(1))",
    "export const a = alert(1)",
    "import a from 'data:text/javascript,alert(1)'",
    "a\nexport const b = alert(1)\n",
    "    code",
    "*a* _b_ **c** `d` ~~e~~ # f",
    "```\ncode\n```",
    "1. list",
    "&lt;script&gt; &#60;script&#62;",
    "<!-- a -->",
    "a\\",
]


def literal(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_contain_no_syntax(text: str) -> None:
    # Character references are the only syntax left; those of letters keep "import" and "export" from being code.
    assert re.fullmatch(r"(&#\d+;|[^\W_]| )*", escape_markdown(text))
    assert not re.match(r"\s*(import|export)", escape_markdown(text))


@given(st.text() | st.sampled_from(HOSTILE) | st.text("*_{}<>[]()!`#&;\\ \n-+.:/ae1", max_size=20))
def test_escaped_texts_are_one_literal_paragraph(text: str) -> None:
    tokens = MarkdownIt().parse(f"**{escape_markdown(text)}**" if literal(text) else "")
    inline = [token for token in tokens if token.type == "inline"]
    assert [token.type for token in tokens if token.type != "inline"] == ["paragraph_open", "paragraph_close"] * bool(
        inline
    )
    shown = [child for token in inline for child in token.children or []]
    assert {child.type for child in shown} <= {"text", "text_special", "strong_open", "strong_close"}
    assert "".join(child.content for child in shown) == literal(text)


def test_undecodable_file_names_can_be_sent() -> None:
    assert escape_markdown("view_\udce9.png\u202e").encode().decode() == "&#118;iew&#95;&#65533;&#46;png&#65533;"


class Markdown:
    """Stand-in for viser's element."""

    content = ""


def new_panel() -> ViewerPanel:
    return ViewerPanel(Settings(RunSettings.from_options(wys.config.pipeline, PROFILE.of_scenes), ["none"]), live=True)


def test_status_and_caption_are_escaped() -> None:
    panel = new_panel()
    panel._status, panel._images = Markdown(), Markdown()  # type: ignore
    panel.show_status("finished {a}", "<b>")
    assert panel._status.content == "**&#102;inished &#123;a&#125;**\n\n*&#60;b&#62;*"  # type: ignore
    panel.show_status("finished")
    assert panel._status.content == "**&#102;inished**"  # type: ignore
    panel.show_images('"{x}" in ![a](b).png', [torch.zeros(2, 2, 3)])
    caption, image = panel._images.content.split("\n\n")  # type: ignore
    assert caption == escape_markdown('"{x}" in ![a](b).png') and image.startswith(
        "![training view](data:image/png;base64,"
    )


@pytest.mark.parametrize(
    ("size", "shown"),
    [((900, 1200), (288, 384)), ((64, 80), (256, 320)), ((200, 384), (200, 384)), ((400, 300), (384, 288))],
)
def test_images_are_stacked_at_about_the_width_of_the_panel(size: tuple[int, int], shown: tuple[int, int]) -> None:
    panel = new_panel()
    panel._images = Markdown()  # type: ignore
    levels = (0.2, 0.8)
    panel.show_images("views", [torch.full((*size, 3), level) for level in levels])
    encoded = panel._images.content.rpartition("base64,")[2].removesuffix(")")  # type: ignore
    stack = np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert stack.shape == (2 * shown[0], shown[1], 3) and max(shown) <= IMAGE_SIDE
    for number, level in enumerate(levels):
        assert (stack[number * shown[0] : (number + 1) * shown[0]] == round(255 * level)).all()


def client_at(position: list[float], aspect: float) -> viser.ClientHandle:
    """Return a client whose camera looks at the origin, without a connection."""
    client = MagicMock(spec=viser.ClientHandle, atomic=nullcontext)
    client._websock_connection = MagicMock()
    camera = client.camera = viser.CameraHandle(client)
    camera._state.position, camera._state.aspect = np.array(position), aspect
    camera._state.look_at, camera._state.update_timestamp = np.zeros(3), 1.0
    camera.up_direction = np.array([0.0, 0.0, 1.0])
    return client


@pytest.mark.parametrize("aspect", [1.6, 0.46])
def test_a_clients_camera_is_moved_to_that_of_a_view(aspect: float) -> None:
    panel, client, other = new_panel(), client_at([3.0, 1.0, 2.0], aspect), client_at([1.0, 1.0, 1.0], aspect)
    panel._server = MagicMock(spec=viser.ViserServer)
    panel._server.get_clients.return_value = {4: client, 5: other}
    backward = torch.nn.functional.normalize(torch.tensor([0.3, -0.8, 0.4]), dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.1, 0.0, 1.0]), backward), dim=0)
    place = torch.tensor([0.2, -0.9, 0.5])
    pose = torch.stack([right, torch.linalg.cross(backward, right), backward, place], dim=1)
    panel.move_camera(4, Cameras(pose[None], 70.0, 60.0, 40.0, 32.0, 80, 64))
    panel.move_camera(6, Cameras(pose[None], 70.0, 60.0, 40.0, 32.0, 80, 64))  # has left
    # What nerfstudio renders for this client.
    state = Viewer.get_camera_state(SimpleNamespace(ready=False, current_camera_idx=0), client)  # type: ignore
    np.testing.assert_allclose(state.c2w, pose, atol=1e-6)
    vertical = math.tan(state.fov / 2)
    assert vertical >= 32 / 60 - 1e-9 and vertical * aspect >= 40 / 70 - 1e-9
    assert vertical == pytest.approx(32 / 60) or vertical * aspect == pytest.approx(40 / 70)
    np.testing.assert_allclose(camera_of(client), [*place, *-backward], atol=1e-6)
    assert np.array_equal(other.camera.position, [1.0, 1.0, 1.0])
