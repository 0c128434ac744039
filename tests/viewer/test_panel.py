"""Texts of the viewer's panel: file names, instructions and messages are shown literally."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from wys_nerfstudio.config import wys
from wys_nerfstudio.editing.stable_diffusion import PROFILE
from wys_nerfstudio.training.settings import RunSettings, Settings
from wys_nerfstudio.viewer.panel import ViewerPanel, escape_markdown

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


def test_status_and_caption_are_escaped() -> None:
    panel = ViewerPanel(Settings(RunSettings.from_options(wys.config.pipeline, PROFILE.of_scenes), ["none"]), live=True)
    panel._status, panel._preview = Markdown(), Markdown()  # type: ignore
    panel.show_status("finished {a}", "<b>")
    assert panel._status.content == "**&#102;inished &#123;a&#125;**\n\n*&#60;b&#62;*"  # type: ignore
    panel.show_status("finished")
    assert panel._status.content == "**&#102;inished**"  # type: ignore
    panel.show_preview('"{x}" in ![a](b).png', [torch.zeros(2, 2, 3)])
    caption, image = panel._preview.content.split("\n\n")  # type: ignore
    assert caption == escape_markdown('"{x}" in ![a](b).png') and image.startswith("![preview](data:image/png;base64,")
