"""A short soak test, in which clients use the viewer of a run, and the detection of growth on synthetic samples."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from soak import Sample, growth, plot, soak


def synthetic_samples(memory: Callable[[int], float], threads=lambda step: 9, files=lambda step: 8) -> list[Sample]:
    # Fluctuates with the phases, like the samples of a run.
    return [
        Sample(step, memory(step) + step % 40 / 4, threads(step) + (step % 60 == 0), files(step) + (step % 60 == 0))
        for step in range(1, 3001, 5)
    ]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (synthetic_samples(lambda step: 1000), None),
        (synthetic_samples(lambda step: 1000 if step > 700 else step, lambda step: 9 if step > 700 else 1), None),
        (synthetic_samples(lambda step: 1000 + 0.02 * step), None),
        (synthetic_samples(lambda step: 1000 + 0.05 * step), "memory grew by"),
        (synthetic_samples(lambda step: 1000, threads=lambda step: 9 + step // 60), "threads grew from"),
        (synthetic_samples(lambda step: 1000, files=lambda step: 8 + step // 60), "files grew from"),
    ],
    ids=["constant", "warmup", "small growth", "memory leak", "thread leak", "file leak"],
)
def test_leaks_are_reported_and_fluctuations_are_not(samples: list[Sample], message: "str | None") -> None:
    messages = growth(samples).messages()
    assert len(messages) == (message is not None)
    assert message is None or message in messages[0]


@pytest.mark.slow
def test_a_short_soak_has_no_growth(tmp_path: Path) -> None:
    samples = soak(tmp_path, steps=200, clients=2)
    steps = [sample.step for sample in samples]
    assert steps == sorted(set(steps)) and steps[-1] >= 195
    grown = growth(samples)
    assert grown.memory < 0.05 and grown.last.files <= grown.first.files
    plot(samples, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 5000
