"""nerfstudio's own commands on a finished run, in this process: what its viewer listens on, and refusals in one sentence."""

import copy
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from conftest import sentence_of, write_ring_scene
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.scripts import eval as ns_eval
from nerfstudio.scripts import exporter, render, train
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.utils import writer
from nerfstudio.viewer.viewer import Viewer
from scripts import run_script
from test_bad_input import TINY
from viser import infra

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.trainer import SavedConfig
from wys_nerfstudio.training.checkpoint import read_checkpoint
from wys_nerfstudio.training.interrupts import report_uncaught_errors
from wys_nerfstudio.utils.errors import WysError

RUN = Path("out", "scene", "wys-tiny", "run")


@pytest.fixture(scope="module")
def finished(editor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a short run was started, with relative paths: `scene` and `RUN`."""
    folder = tmp_path_factory.mktemp("finished")
    write_ring_scene(folder / "scene", width=24, height=20, views=14)
    typed = ["ns-train", "wys-tiny", "--data=scene", "--editor", str(editor_folder), *TINY, "--output-dir=out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(writer, "EVENT_WRITERS", [])
        patch.setattr(sys, "argv", [*typed, "--timestamp=run", "--instruction=make the ball blue"])
        train.entrypoint()
    return folder


class ViewerOpenedError(Exception):
    """Raised where ns-viewer would wait for Ctrl-C."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def viewers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Viewer]]:
    """Viewers that ns-viewer opens; they are closed after the test."""
    opened: list[Viewer] = []

    def wait(_seconds: float) -> None:
        raise ViewerOpenedError

    def open_viewer(*arguments: object, **named: object) -> Viewer:
        opened.append(Viewer(*arguments, **named))  # type: ignore
        return opened[-1]

    monkeypatch.setattr(infra, "WebsockServer", infra.WebsockServer)  # restored after the test
    monkeypatch.setattr(run_viewer, "ViewerState", open_viewer)
    monkeypatch.setattr(run_viewer, "time", SimpleNamespace(sleep=wait))
    yield opened
    for viewer in opened:
        viewer.viser_server.stop()


def is_open(address: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((address, port)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of the local machine")
@pytest.mark.parametrize(
    ("arguments", "open_to_others"),
    [
        ([], False),
        (["--viewer.websocket-host=0.0.0.0"], True),
        (["--viewer.websocket_host", "0.0.0.0"], True),
    ],
    ids=str,
)
def test_ns_viewer_opens_no_port_to_others_unless_typed(
    finished: Path, viewers: list[Viewer], monkeypatch, capsys, arguments: list[str], open_to_others: bool
) -> None:
    port = free_port()
    command = ["ns-viewer", "--load-config", RUN / "config.yml", "--viewer.websocket-port", port, *arguments]
    monkeypatch.chdir(finished)
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(ViewerOpenedError):
        run_viewer.entrypoint()
    assert is_open("127.0.0.1", port)
    # Every address 127.x.y.z is of this machine, but only a server on all interfaces listens on each.
    assert is_open("127.0.0.2", port) is open_to_others
    assert f"http://{'0.0.0.0' if open_to_others else '127.0.0.1'}:{port}" in capsys.readouterr().out


def test_config_yml_has_the_host_that_was_typed_in_training() -> None:
    options = {**vars(copy.deepcopy(wys_tiny.config)), "viewer": ViewerConfig(websocket_host="0.0.0.0")}
    saved = SavedConfig(**options)
    assert saved.viewer.websocket_host == "0.0.0.0" and yaml.load(yaml.dump(saved), yaml.Loader).viewer == saved.viewer


def remove_frames(scene: Path) -> None:
    path = scene / "transforms.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "frames": meta["frames"][:7]}))


def of_another_method(checkpoint: Path) -> None:
    state = read_checkpoint(checkpoint)
    state["pipeline"] = {name: value for name, value in state["pipeline"].items() if "relevance" not in name}
    torch.save(state, checkpoint)


CHECKPOINTS = RUN / "nerfstudio_models"
CHECKPOINT = CHECKPOINTS / "step-000000004.ckpt"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "moved data": (
        lambda f: (f / "scene").rename(f / "elsewhere"),
        'There is no data at "scene": start this command in',
    ),
    "moved run": (
        lambda f: (f / "out").rename(f / "runs"),
        f'No checkpoint found in "{CHECKPOINTS}": start this command',
    ),
    "no checkpoint": (
        lambda f: (f / CHECKPOINT).unlink(),
        f'No checkpoint found in "{CHECKPOINTS}": start this command',
    ),
    "damaged": (lambda f: (f / CHECKPOINT).write_bytes(b"PK"), f'The checkpoint "{CHECKPOINT}" could not be read: '),
    "another method's": (lambda f: of_another_method(f / CHECKPOINT), "The run is not a scene of this shape: "),
    "fewer frames": (lambda f: remove_frames(f / "scene"), "The run was trained on 13 views and this data has 7"),
    "missing image": (lambda f: (f / "scene" / "images" / "frame_003.png").unlink(), "frame_003.png"),
}
"""Changes of the folder of a finished run, and part of the sentence that nerfstudio's commands end with."""
COMMANDS: dict[str, tuple[ModuleType, list[str]]] = {
    "eval": (ns_eval, ["--output-path=eval.json"]),
    "render": (render, ["interpolate", "--output-path=r.mp4", "--pose-source=train"]),
    "export": (exporter, ["pointcloud", "--output-dir=exports", "--normal-method=open3d"]),
    "viewer": (run_viewer, []),
}


@pytest.mark.parametrize(
    ("command", "fault"),
    [*(("eval", fault) for fault in FAULTS), *((command, "missing image") for command in list(COMMANDS)[1:])],
)
def test_a_finished_run_that_was_changed_is_refused_in_one_sentence(
    finished: Path, tmp_path: Path, monkeypatch, command: str, fault: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restored after the test
    change, expected = FAULTS[fault]
    change(folder)
    (config,) = Path().glob("*/scene/wys-tiny/run/config.yml")
    script, arguments = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [f"ns-{command}", *arguments, "--load-config", str(config)])
    assert expected in sentence_of(script.entrypoint)


@pytest.mark.slow
def test_ns_render_reports_data_that_it_reads_by_itself_in_one_sentence(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    FAULTS["missing image"][0](folder)
    options = ["dataset", "--load-config", str(RUN / "config.yml"), "--output-path=renders", "--split=train"]
    # The variable is for a new process: a fork of multiprocessing prints uncaught errors itself.
    done = run_script("render", options, folder, PYTHONWARNINGS="ignore")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("wys: ") and "frame_003.png" in done.stderr


@pytest.mark.parametrize(
    ("error", "printed"), [(WysError("A sentence."), "wys: A sentence.\n"), (OSError(), "OSError\n")]
)
def test_uncaught_errors_of_the_user_are_printed_as_sentences(monkeypatch, capsys, error, printed) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    report_uncaught_errors()
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == printed
