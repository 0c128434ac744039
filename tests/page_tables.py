"""Generated tables of the pages: `python tests/page_tables.py` writes them again.

A table is between `<!-- table: NAME -->` and `<!-- end -->`. `options` comes from the registered methods and their help,
`recipes` from the files of configs/, `clip` from the embedded CLIP's evaluation.json. Every other NAME is the file
`.github/benchmarks/NAME.json` of measured values, whose commands, hardware and date follow the table.
"""

import ast
import inspect
import json
import re
from statistics import mean
from typing import Any, get_type_hints

import yaml
from pages import PAGES, ROOT

from wys_nerfstudio.config import wys, wys_tiny
from wys_nerfstudio.demo.instructions import EDITS
from wys_nerfstudio.pipeline import WysPipelineConfig
from wys_nerfstudio.trainer import WysTrainerConfig

BENCHMARKS = ROOT / ".github" / "benchmarks"
CONFIGS = ROOT / "configs"
CLIP_EVALUATION = ROOT / "wys_nerfstudio" / "demo" / "clip" / "evaluation.json"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n\n?)(.*?)(\n*<!-- end -->)", re.DOTALL)

OPTIONS = [
    "instruction", "base_run", "editor", "localization", "mask_threshold", "guidance_scale", "image_guidance_scale",
    "edit_steps", "edit_every",
]  # fmt: skip
"""Options of the pipeline in the table `options`; `--recipe` is added. `ns-train wys --help` shows all."""


def help_of(config: type) -> dict[str, str]:
    """The docstring of every option of a config and its base classes, in one line."""
    found: dict[str, str] = {}
    for base in config.__mro__[:-1]:
        (node,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(node, ast.ClassDef)
        for option, below in zip(node.body, node.body[1:]):
            if (
                isinstance(option, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found.setdefault(ast.unparse(option.target), " ".join(str(below.value.value).split()))
    return found


def flag_of(name: str) -> str:
    """The flag of an option of the pipeline: its short form if it has one."""
    hint = get_type_hints(WysPipelineConfig, include_extras=True)[name]
    aliases = [alias for part in getattr(hint, "__metadata__", ()) for alias in getattr(part, "aliases", None) or ()]
    return aliases[0] if aliases else f"--pipeline.{name.replace('_', '-')}"


def options_table() -> list[list[str]]:
    """One row per option: flag, defaults of both methods, meaning."""

    def shown(value: Any) -> str:
        return "" if value in (None, "") else f"`{value}`" if isinstance(value, str) else f"{value}"

    meanings = help_of(type(wys.config.pipeline))
    rows = [["option", "`wys`", "`wys-tiny`", "meaning"]]
    for name in OPTIONS:
        defaults = [shown(getattr(method.config.pipeline, name)) for method in (wys, wys_tiny)]
        rows.append([f"`{flag_of(name)}`", *defaults, meanings[name]])
    return [*rows, ["`--recipe`", "", "", help_of(WysTrainerConfig)["recipe"]]]


def recipes_table() -> list[list[str]]:
    """One row per recipe: file, the first sentence of its comment, options."""
    rows = [["recipe", "use", "options"]]
    for path in sorted(CONFIGS.glob("*.yaml")):
        text = path.read_text("utf8")
        comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
        options = ", ".join(f"`{option}: {value}`" for option, value in yaml.safe_load(text).items())
        rows.append([f"[{path.name}]({path.name})", comment.split(". ")[0] + ".", options])
    return rows


def clip_table() -> list[list[str]]:
    """One row per kind of edit: accuracy and direction similarities of the embedded CLIP on held-out scenes."""
    result = json.loads(CLIP_EVALUATION.read_text("utf8"))
    kinds = {
        "recolor ball or block": lambda slug: slug.startswith(("ball", "block")),
        "panda, polar bear": {"panda", "polar-bear"}.__contains__,
        "hat": "hat".__eq__,
        "sunglasses": "sunglasses".__eq__,
        "snow, night": {"snow", "night"}.__contains__,
        "no change": "no-change".__eq__,
        "all": lambda slug: True,
    }
    rows = [
        [
            f"edit ({result['scenes']} scenes)",
            f"accuracy among {len(EDITS)} captions",
            "direction similarity",
            "other captions",
        ]
    ]
    for kind, belongs in kinds.items():
        columns = [
            [v for slug, v in result[key].items() if belongs(slug)]
            for key in ("accuracy", "own_direction", "other_direction")
        ]
        rows.append([kind, *(f"{mean(values):.3f}" if values else "" for values in columns)])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Header and rows as Markdown."""
    assert len({len(row) for row in rows}) == 1, rows
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def source_line(record: dict[str, Any]) -> str:
    """How the values of a record were measured: commands, hardware, date."""
    given = record["command"]
    where = f"on {record['hardware']} ({record['date']})."
    note = f" {record['note']}" if "note" in record else ""
    if isinstance(given, str):
        return f"Measured with `{given}` {where}{note}"
    return f"Measured with these commands {where}{note}\n\n```bash\n" + "\n".join(given) + "\n```"


def table(name: str) -> str:
    """A table as it is now; measured values with their source."""
    if name in GENERATED:
        return markdown(GENERATED[name]())
    record = json.loads((BENCHMARKS / f"{name}.json").read_text("utf8"))
    return f"{markdown([record['columns'], *record['rows']])}\n\n{source_line(record)}"


GENERATED = {"options": options_table, "recipes": recipes_table, "clip": clip_table}
"""Tables that are not measured values."""


def names_of(text: str) -> set[str]:
    """Names of the tables of a page."""
    return {match[2] for match in MARKED.finditer(text)}


def with_tables(text: str) -> str:
    """A page with all of its tables as they are now."""
    return MARKED.sub(lambda m: f"<!-- table: {m[2]} -->\n\n{table(m[2])}\n\n<!-- end -->", text)


if __name__ == "__main__":
    for page, text in PAGES.items():
        (ROOT / page).write_text(with_tables(text), "utf8")
