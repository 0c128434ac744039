"""Timesteps and noise levels of Stable Diffusion sampling."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.editing import load_editor
from wys_nerfstudio.editing.stable_diffusion import timesteps
from wys_nerfstudio.utils.errors import WysError

starts = st.integers(2, 2000).flatmap(lambda total: st.tuples(st.integers(1, total - 1), st.just(total)))


@given(starts, st.integers(1, 200))
def test_timesteps_decrease_from_the_start_to_at_least_one(start_and_total, full_steps):
    start, total = start_and_total
    steps = timesteps(start, full_steps, total)
    assert steps[0] == start
    assert all(later < earlier for earlier, later in zip(steps, steps[1:]))
    assert steps[-1] >= 1


@given(starts, st.integers(1, 200))
def test_the_number_of_timesteps_is_proportional_to_the_noise(start_and_total, full_steps):
    start, total = start_and_total
    count = len(timesteps(start, full_steps, total))
    share = full_steps * start / (total - 1)
    assert 1 <= count <= start
    assert count in (1, start) or abs(count - share) <= 0.5


@given(starts, st.integers(1, 200))
def test_timesteps_are_evenly_spaced(start_and_total, full_steps):
    start, total = start_and_total
    steps = [*timesteps(start, full_steps, total), 0]
    gaps = [earlier - later for earlier, later in zip(steps, steps[1:])]
    assert max(gaps) - min(gaps) <= 1


def test_timesteps_of_known_starts():
    assert timesteps(999, 20, 1000)[:3] == [999, 950, 900]
    assert len(timesteps(999, 20, 1000)) == 20
    assert len(timesteps(500, 20, 1000)) == 10
    assert timesteps(800, 4, 1000) == [800, 534, 267]


def test_low_noise_or_one_step_gives_a_single_timestep():
    assert timesteps(1, 100, 1000) == [1]
    assert timesteps(10, 20, 1000) == [10]
    assert timesteps(999, 1, 1000) == [999]


def test_excess_steps_give_every_timestep():
    assert timesteps(7, 1000, 10) == [7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("start", [0, -1, 1000, 1001])
def test_a_start_outside_the_diffusion_is_refused(start):
    with pytest.raises(ValueError, match=rf"first timestep must be in \[1, 999\], not {start}"):
        timesteps(start, 20, 1000)


@pytest.mark.parametrize("full_steps", [0, -3])
def test_less_than_one_diffusion_step_is_refused(full_steps):
    with pytest.raises(ValueError, match=f"number of diffusion steps must be at least 1, not {full_steps}"):
        timesteps(500, full_steps, 1000)


def test_noise_levels_match_the_timesteps(editor_folder: Path):
    editor = load_editor(str(editor_folder))
    for strength, start in ((1.0, 999), (0.5, 500), (0.0, 1)):
        levels, steps = editor.noise_levels(strength, 20, (8, 8)), timesteps(start, 20, 1000)
        assert [level.time for level in levels] == [*steps, 0]
        signal = editor.alphas_cumprod[steps].sqrt()
        assert torch.equal(torch.tensor([level.signal for level in levels[:-1]]), signal)
        noise = (1 - editor.alphas_cumprod[steps]).sqrt()
        assert torch.equal(torch.tensor([level.noise for level in levels[:-1]]), noise)
        assert (levels[-1].signal, levels[-1].noise) == (1, 0)


@pytest.mark.parametrize("num_steps", [1, 500, 501, 999])
def test_a_full_run_has_the_requested_number_of_steps(editor_folder: Path, num_steps):
    assert len(load_editor(str(editor_folder)).noise_levels(1.0, num_steps, (8, 8))) == num_steps + 1


def test_more_steps_than_noise_levels_are_refused(editor_folder: Path):
    editor = load_editor(str(editor_folder))
    for num_steps in (1000, 5000):
        with pytest.raises(
            WysError, match=f"has 999 noise levels: --diffusion-steps .* at most 999, not {num_steps}[.]"
        ):
            editor.noise_levels(0.02, num_steps, (8, 8))


def test_noise_levels_of_maps_are_valid_timesteps(editor_folder: Path):
    editor = load_editor(str(editor_folder))
    assert [editor.noise_level(share, (8, 8)).time for share in (0.0001, 0.8, 0.9999)] == [0, 800, 999]
