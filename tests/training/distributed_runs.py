"""Short runs of several ranks on gloo, as a program: nerfstudio's launcher starts ranks on CUDA devices only.

All ranks are forks of one process that has imported everything. Each runs nerfstudio's own training function, and leaves what
it holds at the end, what it held after each round of edits, and which edits it made itself.

    python tests/training/distributed_runs.py FOLDER
"""

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process must not inherit torch's threads
sys.path.insert(0, str(Path(__file__).parent.parent))  # conftest, when this file is run as a script

import torch
import torch.distributed as dist
import torchmetrics.image  # noqa: F401  once, for all forks
import tyro
from conftest import build_editor_folder, write_ring_scene
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.scripts import train
from nerfstudio.utils import comms

from wys_nerfstudio.datamanager import WysDataManager
from wys_nerfstudio.editing import load_editor
from wys_nerfstudio.trainer import WysTrainer
from wys_nerfstudio.training.edit_loop import EditLoop
from wys_nerfstudio.viewer.panel import ON_TOP, ViewerCommand

VIEWS = 7
OPTIONS = [
    "--vis=tensorboard",
    "--machine.device-type=cpu",
    "--steps-per-save=4",
    "--timestamp=run",
    "--instruction=make the ball blue",
    "--mask-threshold=0.3",
    "--pipeline.reconstruct-steps=4",
    "--pipeline.localize-steps=3",
    "--pipeline.edit-steps=8",
    "--pipeline.edit-every=2",
    "--pipeline.edit-count=3",
    "--pipeline.diffusion-steps=2",
    "--pipeline.relevance-num-samples=1",
    "--pipeline.relevance-batch-size=2",
    "--pipeline.model.num-nerf-samples-per-ray=4",
    "--pipeline.model.num-proposal-samples-per-ray=8",
    "--pipeline.model.log2-hashmap-size=10",
    "--pipeline.model.proposal-warmup=5",
    "--pipeline.datamanager.train-num-rays-per-batch=64",
    "--pipeline.datamanager.edit-num-rays-per-batch=64",
]
Happens = Callable[[WysTrainer, int], None]


def masks_of(folder: Path) -> dict[str, bytes]:
    """The masks in a run's folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*/*/run/wys/masks/*.png"))}


def train_as(rank: int, ranks: int, port: int, arguments: list[str], folder: Path, happens: Happens) -> None:
    """One rank; leaves `rank-N.pt` in the folder."""
    if ranks > 1:
        url = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=url, world_size=ranks, rank=rank, timeout=timedelta(seconds=60))
        comms.LOCAL_PROCESS_GROUP = dist.new_group(list(range(ranks)))
    kept: dict[str, Any] = {"rounds": [], "edited": [], "maps": []}
    edit, edited, raw_maps = EditLoop.edit, WysDataManager.edit_views, WysDataManager._raw_maps
    iteration = WysTrainer.train_iteration

    def watched_edit(loop: EditLoop, step: int, where: Path) -> None:
        edit(loop, step, where)
        kept["rounds"].append(loop._data.current_views(range(VIEWS)).clone())

    def watched_edited(data: WysDataManager, editor, views, *rest, seeds, **named):
        kept["edited"] += list(zip(views, seeds))
        return edited(data, editor, views, *rest, seeds=seeds, **named)

    def watched_maps(data: WysDataManager, editor, views, *rest, **named):
        kept["maps"] += list(views)
        return raw_maps(data, editor, views, *rest, **named)

    def watched_iteration(trainer: WysTrainer, step: int):
        result = iteration(trainer, step)
        happens(trainer, step)
        return result

    EditLoop.edit, WysDataManager.edit_views = watched_edit, watched_edited
    WysDataManager._raw_maps, WysTrainer.train_iteration = watched_maps, watched_iteration
    sys.argv = ["ns-train", *arguments]
    config: Any = tyro.cli(AnnotatedBaseConfigUnion, args=arguments)  # type: ignore
    config.pipeline.datamanager.data = config.data
    config.set_timestamp()
    if rank == 0:
        config.save_config()
    train._set_random_seed(config.machine.seed + rank)
    trainer = config.setup(local_rank=rank, world_size=ranks)
    trainer.setup()
    trainer.train()
    data = trainer.pipeline.datamanager
    kept |= {
        "weights": trainer.pipeline.weights(),
        "views": data.current_views(range(VIEWS)),
        "relevance": data.cached_batch["relevance"],
        "history": trainer.pipeline.session.history.data(),
    }
    torch.save(kept, folder / f"rank-{rank}.pt")


def run(
    name: str, folder: Path, arguments: list[str], ranks: int = 2, happens: Happens = lambda *_: None
) -> list[dict[str, Any]]:
    """Runs all ranks; returns how each of them ended: `code` and what it `said`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"{name}-{rank}.txt" for rank in range(ranks)]
    children = []
    for rank, log in enumerate(logs):
        child = os.fork()
        if child == 0:
            code: Any = 1
            with log.open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            try:
                train_as(rank, ranks, port, [*arguments, "--output-dir", str(folder)], folder, happens)
                code = 0
            except SystemExit as error:
                print(error.code)
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [{"code": code, "said": log.read_text()} for code, log in zip(codes, logs)]


def at(step: int, what: Callable[[WysTrainer], object], only: Optional[int] = None) -> Happens:
    """Lets something happen after a step, on one rank or on all."""

    def happens(trainer: WysTrainer, now: int) -> None:
        if now == step and only in (None, trainer.local_rank):
            what(trainer)

    return happens


def ask(*requests: ViewerCommand) -> Callable[[WysTrainer], object]:
    """Puts requests into the panel's queue, as the viewer does."""
    return lambda trainer: [trainer.pipeline.panel.commands.put(request) for request in requests]


def main() -> None:
    """Makes all the runs that the tests look at; `endings.json` says how they ended."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    scene = write_ring_scene(folder / "scene", width=24, height=20, views=VIEWS)
    editor = build_editor_folder(folder / "editor")
    load_editor(str(editor))
    start = ["wys-tiny", "--data", str(scene), "--editor", str(editor), *OPTIONS]
    endings = {"one": run("one", folder / "one", start, ranks=1), "two": run("two", folder / "two", start)}

    stopped = folder / "stopped"
    # As the launcher ends its ranks on Ctrl-C: the terminal's SIGINT reaches all, its own SIGTERM follows.
    endings["stopped"] = run("stopped", stopped, start, happens=at(9, lambda _: os.kill(os.getpid(), signal.SIGINT)
                             or os.kill(os.getpid(), signal.SIGTERM)))  # fmt: skip
    again = [*start, "--load-dir", str(stopped / "scene" / "wys-tiny" / "run")]
    endings["resumed"] = run("resumed", stopped, again)

    died = folder / "died"
    endings["died"] = run("died", died, start, happens=at(9, lambda _: os._exit(9), only=1))
    again = [*start, "--load-dir", str(died / "scene" / "wys-tiny" / "run")]
    endings["revived"] = run("revived", died, again)

    apply = ViewerCommand("apply", ON_TOP, "make the bear red")
    endings["applied"] = run("applied", folder / "applied", start, happens=at(13, ask(apply), only=0))
    undone = ask(apply, ViewerCommand("undo"))
    endings["undone"] = run("undone", folder / "undone", start, happens=at(14, undone, only=0))
    shutil.rmtree(editor)
    (folder / "endings.json").write_text(json.dumps(endings))


if __name__ == "__main__":
    main()
