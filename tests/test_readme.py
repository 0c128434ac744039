"""The README is true: its tables are the present ones, its commands parse, its sentences are printed, its links lead somewhere."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.scripts import eval as ns_eval
from nerfstudio.scripts import exporter, process_data, render
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.utils import install_checks
from readme_tables import README, ROOT, with_tables

import wys_nerfstudio
from wys_nerfstudio.cli import main

TEXT = README.read_text("utf8")
PARSERS: dict[str, Any] = {
    "ns-train": AnnotatedBaseConfigUnion,
    "ns-render": render.Commands,
    "ns-eval": ns_eval.ComputePSNR,
    "ns-export": exporter.Commands,
    "ns-viewer": tyro.conf.FlagConversionOff[run_viewer.RunViewer],
    "ns-process-data": process_data.Commands,
    "wys": main.Command,
}


def commands(text: str) -> Iterator[str]:
    """Command lines in a text's bash blocks, and those that stand whole in its sentences."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split("&&"))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`(?:[A-Z_]+=[^\s`]+ )?([^`]+)`", prose):
        if re.match(r"(ns-[a-z-]+|wys|python|pytest) \S+ |python \S+\.py$", code):
            # A program and a subcommand alone are a name.
            yield from (part.strip() for part in " ".join(code.split()).split("&&"))


def test_the_tables_are_the_present_ones():
    assert with_tables(TEXT) == TEXT, "stale: python tests/readme_tables.py"
    assert {"options", "whole-edits", "localization"} <= set(re.findall(r"<!-- table: (\S+) -->", TEXT))


@pytest.mark.parametrize("command", sorted(set(commands(TEXT))))
def test_every_command_is_one_that_its_program_takes(command: str, ring_scene: Path, monkeypatch: pytest.MonkeyPatch):
    program, *arguments = shlex.split(command)
    for check in ("check_colmap_installed", "check_ffmpeg_installed"):  # which are not needed to parse a command
        monkeypatch.setattr(install_checks, check, lambda *_: None)
    if program in PARSERS:
        monkeypatch.chdir(ring_scene)  # ns-train without --data looks for a scene where it is started
        try:
            tyro.cli(PARSERS[program], args=arguments)
        except SystemExit as ending:
            assert ending.code == 0 and arguments[-1] in ("-h", "--help"), command
    elif program in ("python", "bash"):
        path = f"{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0]
        assert (ROOT / path).is_file(), command
    else:
        assert program in ("pip", "pytest"), f"nothing tests {command}"


def test_an_unknown_option_would_be_noticed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ending:
        tyro.cli(PARSERS["wys"], args=["demo-scene", "scene", "--sead", "5"])
    assert ending.value.code == 2 and "--sead" in capsys.readouterr().err


def printed_sentences() -> list[str]:
    """All texts in the package, with a mark where something is filled in."""
    texts = []
    for path in Path(wys_nerfstudio.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_sentence_of_the_troubleshooting_is_printed_so():
    quoted = re.findall(r'"\*\*(.+?)\*\*"', TEXT)
    printed = printed_sentences()
    assert len(quoted) >= 10
    assert [sentence for sentence in quoted if not any(sentence in text for text in printed)] == []


def test_every_link_into_the_repository_leads_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    }
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXT) if not link.startswith("http")]
    assert links
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).is_file(), link


def test_the_code_section_names_every_room_and_contract_file():
    part = TEXT.split("\n## Code\n")[1].split("\n## ")[0]
    package = Path(wys_nerfstudio.__file__).parent
    for path in package.glob("*.py"):
        assert f"`{path.name}`" in part or path.stem == "__init__", path.name
    for folder in (path.parent for path in package.glob("*/__init__.py")):
        assert f"`{folder.name}/`" in part, folder.name


def test_the_newest_change_is_of_this_version():
    changes = TEXT.split("\n## Changes\n")[1]
    assert changes.strip().startswith(f"- **{wys_nerfstudio.__version__}**")
