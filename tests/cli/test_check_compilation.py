"""`wys check --compile-editor`: when compilation pays."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import run_wys
from nerfstudio.configs.method_configs import all_methods
from torch._inductor import config as inductor_config

from wys_nerfstudio.cli import check_compilation, check_editor, check_training
from wys_nerfstudio.cli.check_compilation import CACHE_VARIABLE, break_even, measure_compiled


def test_compilation_pays_when_its_seconds_are_saved() -> None:
    table = break_even(plain=3.0, compiled=2.0, compilation=10.5, edits=400)
    assert table["speedup"] == 1.5 and table["pays"] == "after 11 edits (a run has 400)"
    assert 10 * (3.0 - 2.0) < table["compilation, s"] <= 11 * (3.0 - 2.0)


@pytest.mark.parametrize("compiled", [3.0, 4.0])
def test_compilation_that_saves_nothing_never_pays(compiled: float) -> None:
    assert break_even(3.0, compiled, 10.0, 400)["pays"] == "never (a run has 400)"


def test_a_missing_compiler_is_a_row(editor_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv(CACHE_VARIABLE, "kept")
    options = copy.deepcopy(all_methods["wys-tiny"].pipeline)
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        table = measure_compiled(str(editor_folder), torch.device("cpu"), "auto", options)
    assert str(table["speed"]).startswith("not measured: The editor cannot be compiled on this machine")
    assert os.environ[CACHE_VARIABLE] == "kept"


def test_weights_that_are_not_downloaded_are_a_row() -> None:
    options = copy.deepcopy(all_methods["wys-tiny"].pipeline)
    table = measure_compiled("someone/an-editor", torch.device("cpu"), "auto", options)
    assert str(table["speed"]).startswith("not measured: ")


@pytest.mark.slow
def test_the_report_has_the_compiled_editor(
    editor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_editor, "REPEATS", 1)
    monkeypatch.setattr(check_training, "STEPS", 1)
    monkeypatch.setattr(check_compilation, "REPEATS", 1)
    torch._dynamo.reset()
    before = os.environ.get(CACHE_VARIABLE)
    report = tmp_path / "report.json"
    run_wys(monkeypatch, "check", "--editor", editor_folder, "--compile-editor", "--json", report)
    table = json.loads(report.read_text("utf8"))["Compiled editor"]
    assert min(table[row] for row in ("compilation, s", "edit, s", "compiled edit, s")) > 0
    assert table["speedup"] == pytest.approx(table["edit, s"] / table["compiled edit, s"])
    assert table["pays"].endswith("edits (a run has 120)") or table["pays"] == "never (a run has 120)"
    assert os.environ.get(CACHE_VARIABLE) == before
