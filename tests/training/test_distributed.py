"""Communication between ranks, tested in one process; test_distributed_runs.py has runs of two ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
