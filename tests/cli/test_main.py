"""The `wys` command stopped from outside: Ctrl-C, and an output that is closed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_wys, sentence_of

from wys_nerfstudio.cli import compare, main, make_masks, sweep
from wys_nerfstudio.demo import ablations, run


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "function", "arguments", "sentence"),
    [
        (compare, "compare_runs", ["compare", "run"], "Stopped."),
        (run, "run_demo", ["demo"], "Stopped."),
        (sweep, "run_sweep", ["sweep", "list.csv", "-o", "out"], "Stopped; the same wys command continues."),
        (make_masks, "make_masks", ["make-masks", "s", "a", "-o", "out"], "Stopped; the same wys command continues."),
        (ablations, "run_ablations", ["ablate"], "Stopped; the same wys command continues."),
    ],
)
def test_ctrl_c_ends_with_a_sentence(owner, function, arguments, sentence, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(owner, function, interrupt)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run_wys(monkeypatch, *arguments)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"wys: {sentence}\n"
    assert not list(tmp_path.iterdir())


def test_a_stopped_demo_names_the_command_that_resumes(monkeypatch, capsys) -> None:
    def stop(_: object) -> None:
        raise SystemExit(130)

    monkeypatch.setattr(run.ns_train, "main", stop)
    monkeypatch.setattr(sys, "argv", ["wys", "demo"])
    with pytest.raises(SystemExit) as ended:
        run._train(["--data", "scene"])
    assert ended.value.code == 130
    sentence = "wys: --load-dir is for the ns-train command above; wys demo starts a new run.\n"
    assert capsys.readouterr().err == sentence


def test_a_full_disk_ends_with_a_sentence(monkeypatch) -> None:
    def fill_disk(*_: object) -> None:
        raise OSError(28, "No space left on device", "wys-compare/chart.png")

    monkeypatch.setattr(compare, "compare_runs", fill_disk)
    sentence = sentence_of(lambda: run_wys(monkeypatch, "compare", "run"))
    assert sentence == 'wys: "wys-compare/chart.png" could not be written: No space left on device.'


def test_the_entry_point_loads_no_other_module_of_the_package() -> None:
    code = (
        "import sys; import wys_nerfstudio.cli.main; print([n for n in sys.modules if n.startswith('wys_nerfstudio')])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "['wys_nerfstudio', 'wys_nerfstudio.cli', 'wys_nerfstudio.cli.main']"


COMMAND = [sys.executable, "-c", f"from {main.__name__} import entrypoint; print('begun', flush=True); entrypoint()"]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("arguments", [["--help"], ["edit-image", "none.png", "make it red", "-o", "out.png"]])
def test_ctrl_c_at_any_time_leaves_no_traceback(arguments: list[str], seconds: float, tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    time.sleep(seconds)  # most of the time is spent in imports
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1].decode()
    assert "Traceback" not in errors
    assert process.returncode in (0, 1, 130, -signal.SIGINT)  # the last during Python's own exit
    assert errors == "wys: Stopped.\n" or process.returncode != 130


@pytest.mark.slow
def test_a_closed_output_leaves_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", main.__name__, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
