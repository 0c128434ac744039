"""What a stranger relies on: every module, public function, class and option has a docstring."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import wys_nerfstudio

PACKAGE = Path(wys_nerfstudio.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def undocumented(body: list[ast.stmt], within: str = "") -> Iterator[str]:
    """Public classes, functions, methods and dataclass fields without a sentence of their own."""
    for node, below in zip(body, [*body[1:], ast.Pass()]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            # An overridden special method does what Python says that it does.
            if not node.name.startswith("_") and ast.get_docstring(node) is None:
                yield f"{within}{node.name}"
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                data = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
                for name in undocumented(node.body, f"{within}{node.name}."):
                    if data or not name.startswith("field "):
                        yield name
        elif within and isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                yield f"field {within}{ast.unparse(node.target)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_says_what_it_holds_and_so_does_everything_public_in_it(path: Path) -> None:
    tree = ast.parse(path.read_text("utf8"))
    assert ast.get_docstring(tree)
    assert list(undocumented(tree.body)) == []


def test_a_hole_would_be_noticed() -> None:
    code = '@dataclass\nclass A:\n    """A."""\n    b: int = 0\n    def c(self): ...\ndef d(): ...\ndef _e(): ...\n'
    assert list(undocumented(ast.parse(code).body)) == ["field A.b", "A.c", "d"]
