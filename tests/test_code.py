"""Every module, public function, class and option has a docstring."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import wys_nerfstudio

PACKAGE = Path(wys_nerfstudio.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Yield public classes, functions, methods and dataclass fields without a docstring."""
    for node, next_node in zip(body, [*body[1:], ast.Pass()]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            # Special methods need none: Python defines what they do.
            if not node.name.startswith("_") and ast.get_docstring(node) is None:
                yield f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
                for name in undocumented(node.body, f"{prefix}{node.name}."):
                    if is_dataclass or not name.startswith("field "):
                        yield name
        elif prefix and isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            if not (isinstance(next_node, ast.Expr) and isinstance(next_node.value, ast.Constant)):
                yield f"field {prefix}{ast.unparse(node.target)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_and_their_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text("utf8"))
    assert ast.get_docstring(tree)
    assert list(undocumented(tree.body)) == []


def test_missing_docstrings_are_found() -> None:
    code = '@dataclass\nclass A:\n    """A."""\n    b: int = 0\n    def c(self): ...\ndef d(): ...\ndef _e(): ...\n'
    assert list(undocumented(ast.parse(code).body)) == ["field A.b", "A.c", "d"]
