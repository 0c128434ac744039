"""Short runs of several ranks with gloo. A program of its own: nerfstudio's launcher starts ranks on CUDA devices only.

All ranks are forks of one process with all imports done. Each rank writes its final state, its views after each round of
edits, and a record of the edits and relevance maps that it computed.

    python tests/training/distributed_runs.py FOLDER
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process must not inherit torch's threads
sys.path.insert(0, str(Path(__file__).parent.parent))  # conftest, when this file is run as a script

import torch
import torch.distributed as dist
import torchmetrics.image  # noqa: F401  imported once for all forks
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
StepHook = Callable[[WysTrainer, int], None]
"""Receives the trainer and the step that has just been trained."""


def read_masks(folder: Path) -> dict[str, bytes]:
    """Return the edit masks of a run, by file name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*/*/run/wys/masks/*.png"))}


def train_rank(rank: int, ranks: int, port: int, arguments: list[str], folder: Path, after_step: StepHook) -> None:
    """Train as one rank and write `rank-N.pt`.

    Args:
        rank: Number of this rank.
        ranks: Number of ranks.
        port: Port of the process group.
        arguments: Arguments of ns-train.
        folder: Folder to write to.
        after_step: Called after each training step.
    """
    if ranks > 1:
        url = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=url, world_size=ranks, rank=rank, timeout=timedelta(seconds=60))
        comms.LOCAL_PROCESS_GROUP = dist.new_group(list(range(ranks)))
    record: dict[str, Any] = {"rounds": [], "edited": [], "maps": []}
    edit, edit_views, raw_maps = EditLoop.edit, WysDataManager.edit_views, WysDataManager._raw_maps
    train_iteration = WysTrainer.train_iteration

    def recorded_edit(loop: EditLoop, step: int, run_folder: Path) -> None:
        edit(loop, step, run_folder)
        record["rounds"].append(loop._views.current_views(range(VIEWS)).clone())

    def recorded_edit_views(data: WysDataManager, editor, inputs, *rest, seeds, **named):
        record["edited"] += [(edit_input.view, seed) for edit_input, seed in zip(inputs, seeds)]
        return edit_views(data, editor, inputs, *rest, seeds=seeds, **named)

    def recorded_raw_maps(data: WysDataManager, editor, views, *rest, **named):
        record["maps"] += list(views)
        return raw_maps(data, editor, views, *rest, **named)

    def hooked_train_iteration(trainer: WysTrainer, step: int):
        result = train_iteration(trainer, step)
        after_step(trainer, step)
        return result

    EditLoop.edit, WysDataManager.edit_views = recorded_edit, recorded_edit_views
    WysDataManager._raw_maps, WysTrainer.train_iteration = recorded_raw_maps, hooked_train_iteration
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
    record |= {
        "weights": trainer.pipeline.weights(),
        "views": data.current_views(range(VIEWS)),
        "relevance": data.relevance_maps,
        "history": trainer.pipeline.session.history.data(),
    }
    torch.save(record, folder / f"rank-{rank}.pt")


def run(
    name: str, folder: Path, arguments: list[str], ranks: int = 2, after_step: StepHook = lambda *_: None
) -> list[dict[str, Any]]:
    """Run all ranks of one training run.

    Args:
        name: Name of the run, for its logs.
        folder: Folder for logs, records and the run itself.
        arguments: Arguments of ns-train.
        ranks: Number of ranks.
        after_step: Called after each training step, on every rank.

    Returns:
        Exit `code` and `output` of each rank.
    """
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
                train_rank(rank, ranks, port, [*arguments, "--output-dir", str(folder)], folder, after_step)
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
    return [{"code": code, "output": log.read_text()} for code, log in zip(codes, logs)]


def at(step: int, action: Callable[[WysTrainer], object], only: Optional[int] = None) -> StepHook:
    """Return a hook that acts after one step.

    Args:
        step: The step.
        action: Called with the trainer.
        only: Number of the rank that acts. Default: all ranks.
    """

    def after_step(trainer: WysTrainer, trained: int) -> None:
        if trained == step and only in (None, trainer.local_rank):
            action(trainer)

    return after_step


def queue(*commands: ViewerCommand) -> Callable[[WysTrainer], object]:
    """Return an action that puts commands into the panel's queue, as the viewer does."""
    return lambda trainer: [trainer.pipeline.panel.commands.put(command) for command in commands]


def main() -> None:
    """Make all runs of the tests, and write the exit code and output of each rank to `endings.json`."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    scene = write_ring_scene(folder / "scene", width=24, height=20, views=VIEWS)
    editor = build_editor_folder(folder / "editor")
    load_editor(str(editor))
    start = ["wys-tiny", "--data", str(scene), "--editor", str(editor), *OPTIONS]
    endings = {"one": run("one", folder / "one", start, ranks=1), "two": run("two", folder / "two", start)}

    stopped = folder / "stopped"

    def interrupt(_: WysTrainer) -> None:
        # On Ctrl-C the terminal sends SIGINT to all ranks, and the launcher SIGTERM after it.
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    endings["stopped"] = run("stopped", stopped, start, after_step=at(9, interrupt))
    again = [*start, "--load-dir", str(stopped / "scene" / "wys-tiny" / "run")]
    endings["resumed"] = run("resumed", stopped, again)

    died = folder / "died"
    endings["died"] = run("died", died, start, after_step=at(9, lambda _: os._exit(9), only=1))
    again = [*start, "--load-dir", str(died / "scene" / "wys-tiny" / "run")]
    endings["restarted"] = run("restarted", died, again)

    def die_or_block(trainer: WysTrainer) -> None:
        if trainer.local_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        # As in NCCL: nothing raises, and the launcher's SIGTERM is only noted.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(3)

    endings["blocked"] = run("blocked", folder / "blocked", start, after_step=at(9, die_or_block))

    apply = ViewerCommand("apply", ON_TOP, "make the bear red")
    endings["applied"] = run("applied", folder / "applied", start, after_step=at(13, queue(apply), only=0))
    # The last two are carried out by rank 0 alone.
    undone = queue(apply, ViewerCommand("undo"), ViewerCommand("view", value=(0.0,) * 6), ViewerCommand("export"))
    endings["undone"] = run("undone", folder / "undone", start, after_step=at(14, undone, only=0))
    shutil.rmtree(editor)
    (folder / "endings.json").write_text(json.dumps(endings))


if __name__ == "__main__":
    main()
