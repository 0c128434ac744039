"""What several processes that train one scene tell each other, as seen from one; real runs of two are in test_distributed_runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.training import distributed
from wys_nerfstudio.utils.errors import WysError


@given(items=st.lists(st.integers()), size=st.integers(1, 9))
def test_every_item_belongs_to_one_rank_and_shares_are_even(items, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: size)
        shares = []
        for number in range(size):
            patch.setattr(distributed, "rank", lambda number=number: number)
            shares.append(distributed.shard(items))
    assert sorted(item for part in shares for item in part) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_process_is_the_first_and_only_rank():
    done = []
    distributed.main_process_only(done.append)("x")
    assert done == ["x"]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather("x") == ["x"] and distributed.broadcast_from_main(lambda: "y") == "y"


def test_another_error_of_torch_is_no_lost_rank():
    with pytest.raises(RuntimeError, match="out of memory"), distributed.convert_lost_rank_errors():
        raise RuntimeError("out of memory")


def test_a_lost_rank_is_a_sentence(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with (
        pytest.raises(WysError, match="Connection closed by peer.*this one .rank 0. ends too"),
        distributed.convert_lost_rank_errors(),
    ):
        raise RuntimeError("[pair.cc:525] Connection closed by peer [127.0.0.1]:2334")
