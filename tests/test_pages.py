"""The pages are true: tables are current, commands and options exist, quoted messages are in the code, links have targets."""

import argparse
import ast
import contextlib
import functools
import importlib.metadata
import io
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.scripts import eval as ns_eval
from nerfstudio.scripts import exporter, process_data, render
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.utils import install_checks
from page_tables import BENCHMARKS, GENERATED, names_of, with_tables
from pages import PAGES, ROOT, blocks, commands, headings, local_links, options, quoted_messages
from test_imports import level

import wys_nerfstudio
from wys_nerfstudio.cli.commands import Command
from wys_nerfstudio.demo.training import train_editor
from wys_nerfstudio.demo.training.evaluate_editor import write_card

EDITOR = ROOT / "wys_nerfstudio" / "demo" / "editor"
CONTRIBUTING = ".github/CONTRIBUTING.md"
CHANGELOG = ".github/CHANGELOG.md"
KINDS_OF_CHANGES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
FOR_NERFSTUDIO = ".github/nerfstudio/wys.md"
"""A page for nerfstudio's documentation, where this repository's other pages are not at hand."""
PARSERS: dict[str, Any] = {
    "ns-train": AnnotatedBaseConfigUnion,
    "ns-render": render.Commands,
    "ns-eval": ns_eval.ComputePSNR,
    "ns-export": exporter.Commands,
    "ns-viewer": tyro.conf.FlagConversionOff[run_viewer.RunViewer],
    "ns-process-data": process_data.Commands,
    "wys": Command,
}
WYS_COMMANDS = (
    "check",
    "demo",
    "demo-scene",
    "demo-pictures",
    "edit-image",
    "make-masks",
    "sweep",
    "compare",
    "ablate",
    "export",
)
COMMANDS = sorted({command for text in PAGES.values() for command in commands(text)})


def parse_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of one of the repository's scripts, without running the script.

    Args:
        words: Path and arguments, or -m, module and arguments.
        monkeypatch: Ends the script once it has parsed its arguments.
    """
    module = words[0] == "-m"
    target, *arguments = words[1:] if module else words
    path = ROOT / f"{target.replace('.', '/')}.py" if module else ROOT / target
    assert path.is_file(), target
    if not re.search(r"tyro\.cli\(|\.parse_args\(", path.read_text("utf8")):
        assert not arguments, f"{target} takes no arguments"
        return
    real_cli, real_parse_args = tyro.cli, argparse.ArgumentParser.parse_args

    def cli(*args: Any, **options: Any) -> None:
        real_cli(*args, **options)
        raise SystemExit(0)

    def parse_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        real_parse_args(self, *args, **options)
        raise SystemExit(0)

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", [str(path), *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a benchmark sets it when it is imported
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(path), run_name="__main__")
    assert ending.value.code == 0, words


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_current(page: str) -> None:
    assert with_tables(PAGES[page]) == PAGES[page], "stale: python tests/page_tables.py"


def test_every_table_is_on_one_page() -> None:
    shown = sorted(name for text in PAGES.values() for name in names_of(text))
    assert shown == sorted([*GENERATED, *(path.stem for path in BENCHMARKS.glob("*.json"))])


@pytest.mark.parametrize("folder", [EDITOR, EDITOR.with_name("flow_editor")], ids=lambda folder: folder.name)
def test_tables_of_the_editors_cards_are_current(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text("utf8")
    before, rest = card.split("<!-- metrics -->\n")
    (tmp_path / "README.md").write_text(
        before + "<!-- metrics -->\n<!-- end of metrics -->" + rest.split("<!-- end of metrics -->")[1]
    )
    write_card(tmp_path, json.loads((folder / "evaluation.json").read_text("utf8")))
    assert (tmp_path / "README.md").read_text("utf8") == card


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, ring_scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command)
    for check in ("check_colmap_installed", "check_ffmpeg_installed"):  # not needed to parse a command
        monkeypatch.setattr(install_checks, check, lambda *_: None)
    if program in PARSERS:
        monkeypatch.chdir(ring_scene)  # ns-train without --data looks for a scene in the current folder
        try:
            tyro.cli(PARSERS[program], args=arguments)
        except SystemExit as ending:
            assert ending.code == 0 and arguments[-1] in ("-h", "--help"), command
    elif program == "python":
        parse_script(arguments, monkeypatch)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), command
    elif program == "ns-install-cli":
        assert list(importlib.metadata.entry_points(group="console_scripts", name=program))
    else:
        assert program in ("pip", "pytest"), f"no test for {command}"


@pytest.mark.parametrize(
    "command", ["wys demo-scene scene --sead 5", "python tests/benchmarks/scale.py SCENE --outptu DIR"]
)
def test_an_unknown_option_is_noticed(command: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command)
    with pytest.raises((SystemExit, AssertionError)):
        if program == "python":
            parse_script(arguments, monkeypatch)
        else:
            tyro.cli(PARSERS[program], args=arguments)
    assert arguments[2] in capsys.readouterr().err


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Options of this package's methods and commands, of ns-process-data, and of the embedded editor's training."""
    helps = [("ns-train", "wys"), ("ns-process-data", "images"), *(("wys", name) for name in WYS_COMMANDS)]
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as shown:
        patch.setenv("COLUMNS", "400")  # no option is broken over two lines
        for program, name in helps:
            with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
                tyro.cli(PARSERS[program], args=[name, "--help"])
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            tyro.cli(train_editor.Options, args=["--help"])
        return set(re.findall(r"--[a-z][\w.-]*", shown.getvalue()))


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_sentences_exist(page: str, known_options: set[str]) -> None:
    assert sorted(options(PAGES[page]) - known_options) == []


@pytest.mark.parametrize("page", PAGES)
def test_quoted_messages_are_in_the_code(page: str) -> None:
    printed = printed_texts()
    assert [quote for quote in quoted_messages(PAGES[page]) if not any(quote in text for text in printed)] == []


def test_the_readme_quotes_the_frequent_messages() -> None:
    assert len(quoted_messages(PAGES["README.md"])) >= 10


@functools.cache
def printed_texts() -> list[str]:
    """All strings of the package, with a NUL where a value is filled in."""
    texts = []
    for path in Path(wys_nerfstudio.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    for link in local_links(PAGES[page]):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in headings(target.read_text("utf8")), link


def test_every_page_and_the_readme_link_to_each_other() -> None:
    def linked(page: str) -> set[str]:
        paths = [link.partition("#")[0] for link in local_links(PAGES[page])]
        targets = [((ROOT / page).parent / path).resolve().relative_to(ROOT).as_posix() for path in paths if path]
        return {target for target in targets if target in PAGES}

    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = set().union(*(linked(page) for page in new)) - reached
    assert reached == set(PAGES) - {FOR_NERFSTUDIO}
    assert [page for page in reached - {"README.md"} if "README.md" not in linked(page)] == []


def test_every_python_block_is_run_by_a_test() -> None:
    found = {page: len(blocks(text, "python")) for page, text in PAGES.items() if blocks(text, "python")}
    assert found == {"README.md": 1}, "tests/cli/test_edit_image.py runs the README's"


def test_contributing_names_every_room_from_top_to_bottom() -> None:
    part = PAGES[CONTRIBUTING].split("\n## Rooms\n")[1].split("\n## ")[0]
    rooms = [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^\| `(\S+)` \|", part, re.MULTILINE)]
    package = Path(wys_nerfstudio.__file__).parent
    expected = {path.parent.name for path in package.glob("*/__init__.py")} | {
        path.stem for path in package.glob("*.py")
    }
    assert sorted(rooms) == sorted(expected - {"__init__"})
    assert sorted(rooms, key=level) == rooms


def test_the_changelog_is_kept_as_keep_a_changelog_describes() -> None:
    _, *versions = re.split(r"^## ", PAGES[CHANGELOG], flags=re.MULTILINE)
    numbers, dates = zip(
        *(re.findall(r"^\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d|unreleased)\n", text)[0] for text in versions)
    )
    assert numbers[0] == wys_nerfstudio.__version__
    ordered = [tuple(map(int, number.split("."))) for number in numbers]
    assert ordered == sorted(set(ordered), reverse=True)
    assert "unreleased" not in dates[1:] and list(dates[1:]) == sorted(dates[1:], reverse=True)
    for text in versions:
        _, *groups = re.split(r"^### ", text, flags=re.MULTILINE)
        assert groups and {group.split("\n")[0] for group in groups} <= set(KINDS_OF_CHANGES)
        assert all(re.match(r"\w+\n\n- ", group) for group in groups)


def test_the_changelog_names_every_command_and_method() -> None:
    named = {word for code in re.findall(r"`([^`]+)`", PAGES[CHANGELOG]) for word in code.split()}
    assert {*WYS_COMMANDS, "wys", "wys-small", "wys-tiny"} - {"demo-scene", "demo-pictures"} <= named
