"""Progress bars of the terminal."""

import gc
import threading

import pytest
from nerfstudio.utils.rich_utils import CONSOLE

from wys_nerfstudio.utils.progress import track


def test_a_bar_yields_its_values_and_is_printed() -> None:
    with CONSOLE.capture() as capture:
        assert list(track((str(number) for number in range(3)), "Counting", total=3)) == ["0", "1", "2"]
    assert "Counting" in capture.get() and "100%" in capture.get()


def test_a_bar_that_an_error_leaves_blocks_no_later_bar() -> None:
    threads = threading.active_count()

    def fail() -> None:
        bar = track(range(3), "Failing")
        cycle = {"bar": bar}
        cycle["cycle"] = cycle  # so that only the garbage collector ends the bar, in any thread
        for _ in bar:
            assert threading.active_count() == threads, "a refresh thread would wait for itself"
            raise OSError

    with pytest.raises(OSError):
        fail()
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join(timeout=10)
    assert not collector.is_alive()
    assert list(track(range(3), "Later")) == [0, 1, 2]
