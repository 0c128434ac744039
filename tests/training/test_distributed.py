"""Communication between ranks, in one process and in short scripts; test_distributed_runs.py has runs of two ranks."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import multiprocessing

from wys_nerfstudio.training import distributed
from wys_nerfstudio.utils.errors import WysError


@given(items=st.lists(st.integers()), size=st.integers(1, 9))
def test_shards_are_even_and_disjoint(items, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: size)
        shards = []
        for number in range(size):
            patch.setattr(distributed, "rank", lambda number=number: number)
            shards.append(distributed.shard(items))
    assert sorted(item for part in shards for item in part) == sorted(items)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_single_process_is_rank_0():
    calls = []
    distributed.main_process_only(calls.append)("x")
    assert calls == ["x"]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather("x") == ["x"] and distributed.broadcast_from_main(lambda: "y") == "y"


def test_other_torch_errors_are_not_converted():
    with pytest.raises(RuntimeError, match="out of memory"), distributed.convert_lost_rank_errors():
        raise RuntimeError("out of memory")


def test_a_lost_rank_is_converted_to_an_error_message(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with (
        pytest.raises(WysError, match="Connection closed by peer.*this one .rank 0. ends too"),
        distributed.convert_lost_rank_errors(),
    ):
        raise RuntimeError("[pair.cc:525] Connection closed by peer [127.0.0.1]:2334")


@pytest.fixture
def fresh_group():
    """Let `object_group` create a group, and forget it afterwards."""
    distributed.object_group.cache_clear()
    yield
    distributed.object_group.cache_clear()


def test_objects_are_exchanged_over_one_gloo_group(monkeypatch, fresh_group):
    created, used, group = [], [], mock.Mock(spec=dist.ProcessGroup)

    def new_group(**options):
        created.append(options)
        return group

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "all_gather_object", lambda values, value, group=None: used.append(group))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, src, group=None: used.append(group))
    distributed.gather("x")
    distributed.broadcast_from_main(lambda: "y")
    assert used == [group] * 2
    (options,) = created
    assert options["backend"] == "gloo" and options["timeout"] > timedelta(days=30)


BLOCK = "os.kill(os.getpid(), signal.SIGTERM); lock = threading.Lock(); lock.acquire(); lock.acquire()"
"""SIGTERM is what the launcher sends to the other ranks; the handler of a run lets the current step finish."""
ENDINGS = {
    "killed": [BLOCK, BLOCK, "os.kill(os.getpid(), signal.SIGKILL)"],
    "failed": [BLOCK, "raise WysError('no space')"],
    # Time enough on a busy machine, too.
    "both failed": [
        "distributed.GRACE_SECONDS = 20; time.sleep(0.3); raise WysError('mine')",
        "distributed.GRACE_SECONDS = 20; raise WysError('other')",
    ],
    "finished": ["time.sleep(1); saved.touch()", "pass"],
    "interrupted": ["time.sleep(1); saved.touch(); sys.exit(130)", "sys.exit(130)"],
}
"""What each rank does within a `PeerMonitor`."""
RANKS = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch.distributed as dist
from wys_nerfstudio.training import distributed
from wys_nerfstudio.utils.errors import WysError

def run_rank(folder, rank, body, ranks):
    errors = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.alarm(60)
    saved, code = folder / "saved", 0
    try:
        with distributed.PeerMonitor():
            dist.barrier()
            exec(body, {**globals(), "saved": saved})
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        code = 2
    if saved.exists():
        os.write(2, b"saved")
    os._exit(code)

results = {}
for name, bodies in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1], name.replace(" ", "-"))
    folder.mkdir()
    children = []
    for rank, body in enumerate(bodies):
        children.append(os.fork())
        if children[-1] == 0:
            run_rank(folder, rank, body, len(bodies))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results[name] = [(code, Path(folder, f"{rank}.txt").read_text()) for rank, code in enumerate(codes)]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, list[tuple[int, str]]]":
    """Exit code and error output of each rank, for each of `ENDINGS`."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-c", RANKS, str(folder), json.dumps(ENDINGS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_blocked_ranks_end_with_a_sentence_after_a_killed_one(endings):
    *blocked, (code, _) = endings["killed"]
    assert code == -9
    for rank, (code, output) in enumerate(blocked):
        assert code == 1 and output.startswith(
            "wys: Another of the 3 processes that train this scene seems to have ended"
        )
        assert f"this one (rank {rank}) ends too" in output and output.count("\n") == 1


def test_a_blocked_rank_ends_after_an_error_of_another(endings):
    (code, output), failed = endings["failed"]
    assert failed == [2, "WysError: no space"]
    assert code == 1 and output.startswith("wys: Another of the 2 processes")


def test_a_rank_ends_with_its_own_sentence_if_it_can(endings):
    assert endings["both failed"] == [[2, "WysError: mine"], [2, "WysError: other"]]


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("interrupted", 130)])
def test_ranks_that_end_in_order_wait_for_one_another(endings, end, code):
    assert endings[end] == [[code, "saved"]] * 2


def test_the_launcher_ends_with_a_sentence_instead_of_a_traceback(monkeypatch, capsys):
    others: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: others.append(error))
    distributed.shorten_launcher_errors()
    with pytest.raises(multiprocessing.ProcessExitedException) as lost:
        multiprocessing.start_processes(os._exit, nprocs=2, start_method="fork")  # rank 1 exits with code 1
    capsys.readouterr()  # PyTorch names the ranks that it still had to terminate
    sys.excepthook(lost.type, lost.value, lost.tb)
    message = (
        "wys: The run has ended, because process 1 terminated with exit code 1: see the last lines of its output.\n"
    )
    assert capsys.readouterr().err == message and not others
    fault = ValueError("a fault")
    sys.excepthook(ValueError, fault, None)
    assert others == [fault] and not capsys.readouterr().err
