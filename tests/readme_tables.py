"""The README's generated tables: `python tests/readme_tables.py` writes them anew between their marks.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `options` comes from the registered methods and their help;
every other NAME is the file `.github/benchmarks/NAME.json` of measured figures, with its columns, rows, command, hardware and date.
"""

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

from wys_nerfstudio.config import wys, wys_tiny
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainerConfig

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / ".github" / "benchmarks"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n\n?)(.*?)(\n*<!-- end -->)", re.DOTALL)

SHOWN = [
    "instruction", "base_run", "editor", "mask_threshold", "guidance_scale", "image_guidance_scale", "localization",
    "masks_dir", "relevance_normalization", "relevance_num_samples", "relevance_outlier_factor", "edit_every",
    "edit_count", "diffusion_steps", "reconstruct_steps", "localize_steps", "edit_steps", "editor_device", "edit_resolution",
]  # fmt: skip
"""Options of the pipeline that the README shows; `ns-train wys --help` shows all."""


def help_of(config: type) -> dict[str, str]:
    """The sentence under every option of a class, in one line."""
    (node,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(node, ast.ClassDef)
    found: dict[str, str] = {}
    for option, below in zip(node.body, node.body[1:]):
        if isinstance(option, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(option.target)] = " ".join(str(below.value.value).split())
    return found


def flag_of(name: str) -> str:
    """What is typed for an option of the pipeline: its short form if it has one."""
    hint = get_type_hints(WysPipelineConfig, include_extras=True)[name]
    aliases = [alias for part in getattr(hint, "__metadata__", ()) for alias in getattr(part, "aliases", None) or ()]
    return aliases[0] if aliases else f"--pipeline.{name.replace('_', '-')}"


def options_table() -> list[list[str]]:
    """A row per option: flag, defaults of both methods, meaning."""

    def shown(value: Any) -> str:
        return "" if value in (None, "") else f"`{value}`" if isinstance(value, str) else f"{value}"

    sentences = help_of(WysPipelineConfig)
    rows = [["option", "`wys`", "`wys-tiny`", "meaning"]]
    for name in SHOWN:
        defaults = [shown(getattr(method.config.pipeline, name)) for method in (wys, wys_tiny)]
        rows.append([f"`{flag_of(name)}`", *defaults, sentences[name]])
    return [*rows, ["`--recipe`", "", "", help_of(WysTrainerConfig)["recipe"]]]


def rows_of(name: str) -> list[list[str]]:
    """Header and rows of a table."""
    if name == "options":
        return options_table()
    figures = json.loads((BENCHMARKS / f"{name}.json").read_text("utf8"))
    return [figures["columns"], *figures["rows"]]


def markdown(rows: list[list[str]]) -> str:
    """Header and rows as Markdown."""
    assert len({len(row) for row in rows}) == 1, rows
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def with_tables(text: str) -> str:
    """A text with all of its tables as they are now."""
    return MARKED.sub(lambda m: f"<!-- table: {m[2]} -->\n\n{markdown(rows_of(m[2]))}\n\n<!-- end -->", text)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf8")), "utf8")
