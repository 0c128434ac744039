"""The project's Markdown pages: their commands, links, headings and quoted messages."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def _all_pages() -> Iterator[Path]:
    yield README
    for folder in ("configs", "wys_nerfstudio", "tests", ".github"):
        yield from sorted((ROOT / folder).rglob("*.md"))


PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf8") for path in _all_pages()}
"""Text of every page by its path in the repository; README.md comes first."""


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[str]:
    """Command lines in the bash blocks of a text and in its inline code, without environment variables in front."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose):
        line = " ".join(code.split())
        # A program with a subcommand alone is a name.
        if re.match(r"([A-Z_]+=\S+ )?((ns-[a-z-]+|wys|python|pytest) \S+ |python \S+\.py$|ns-[a-z-]+ -|bash )", line):
            lines.append(line)
    for line in lines:
        for part in line.split(" #")[0].split("&&"):
            yield " ".join(re.sub(r"^[A-Z_]+=\S+ ", "", part.strip()).split())


def options(text: str) -> set[str]:
    """Options that a text names by themselves, without a command in front."""
    codes = re.findall(r"`(--[a-z][^`]*)`", text)
    return {option for code in codes for option in re.findall(r"--[a-z][\w.-]*", code)}


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def local_links(text: str) -> list[str]:
    """Targets of links and images within the repository."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]


def quoted_messages(text: str) -> list[str]:
    """Messages of the program that a page quotes: "**...**"."""
    return re.findall(r'"\*\*(.+?)\*\*"', text)
