"""The schedule: phases, order of views, seeds, timesteps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.editing.sampling import edit_seed, timesteps
from wys_nerfstudio.training.schedule import (
    Phase,
    PhaseSchedule,
    noise_level_of_edit,
    view_of_edit,
)

plans = st.builds(PhaseSchedule, st.integers(0, 20), st.integers(0, 10), st.integers(0, 30))
seeds = st.integers(-(2**40), 2**40)


@given(plans)
def test_phases_cover_the_plan_exactly_and_in_order(plan):
    wanted = [Phase.RECONSTRUCT] * plan.reconstruct_steps + [Phase.LOCALIZE] * plan.localize_steps
    wanted += [Phase.EDIT] * plan.edit_steps
    assert plan.total_steps == len(wanted)
    assert [plan.phase(step) for step in range(plan.total_steps)] == wanted


@given(plans, st.integers(0, 1000))
def test_steps_past_the_end_belong_to_the_edit_phase(plan, beyond):
    assert plan.phase(plan.total_steps + beyond) is Phase.EDIT


@given(plans, st.integers(1, 7))
def test_edits_are_due_at_the_edit_phases_first_step_and_every_so_many_from_there(plan, every):
    due = [step for step in range(plan.total_steps) if plan.edits_due(step, every)]
    assert due == list(range(plan.edit_start, plan.total_steps, every))


def test_phases_are_named_as_in_the_documentation():
    assert [phase.value for phase in Phase] == ["reconstruct", "localize", "edit"]


@given(seeds, st.integers(1, 30), st.integers(0, 5))
def test_every_view_is_edited_once_per_round(seed, num_views, edit_round):
    numbers = range(edit_round * num_views, (edit_round + 1) * num_views)
    assert sorted(view_of_edit(seed, number, num_views) for number in numbers) == list(range(num_views))


@given(seeds, st.integers(0, 500), st.integers(1, 50))
def test_what_an_edit_draws_depends_on_seed_and_number_alone(seed, number, num_views):
    def draw():
        level = noise_level_of_edit(seed, number, 0.02, 0.98)
        return view_of_edit(seed, number, num_views), edit_seed(seed, number), level

    first = draw()
    for other in range(5):
        edit_seed(other, other), view_of_edit(other, other, num_views)
    assert draw() == first


def test_rounds_and_runs_have_orders_of_their_own():
    orders = {
        tuple(view_of_edit(seed, edit_round * 20 + i, 20) for i in range(20))
        for seed in range(3)
        for edit_round in range(10)
    }
    assert len(orders) == 30


def test_draws_are_the_same_on_every_machine_and_in_every_release():
    # A resumed run must edit as the uninterrupted one would have, so these numbers are for ever.
    assert [view_of_edit(0, i, 6) for i in range(6)] == [0, 2, 1, 3, 4, 5]
    assert edit_seed(0, 0) == 2220271774497122242
    assert noise_level_of_edit(0, 0, 0.0, 1.0) == 0.4333551030570951


def test_edits_have_seeds_of_their_own_that_torch_takes():
    drawn = [edit_seed(seed, number) for seed in range(20) for number in range(-100, 400)]
    assert len(set(drawn)) == len(drawn)
    assert 0 <= min(drawn) <= max(drawn) < 2**63


@given(seeds, st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_noise_levels_stay_in_their_range(seed, number, a, b):
    low, high = min(a, b), max(a, b)
    assert low <= noise_level_of_edit(seed, number, low, high) <= high


def test_noise_levels_are_spread_evenly_over_their_range():
    levels = [noise_level_of_edit(1, number, 0.2, 0.8) for number in range(3000)]
    counts = [sum(0.2 + 0.1 * i <= level < 0.3 + 0.1 * i for level in levels) for i in range(6)]
    assert all(400 < count < 600 for count in counts)  # 500 expected, standard deviation 20


starts = st.integers(2, 2000).flatmap(lambda total: st.tuples(st.integers(1, total - 1), st.just(total)))


@given(starts, st.integers(1, 200))
def test_timesteps_fall_strictly_from_the_start_to_at_least_one(start_and_total, full_steps):
    start, total = start_and_total
    steps = timesteps(start, full_steps, total)
    assert steps[0] == start
    assert all(later < earlier for earlier, later in zip(steps, steps[1:]))
    assert steps[-1] >= 1


@given(starts, st.integers(1, 200))
def test_the_number_of_timesteps_is_in_proportion_to_the_noise(start_and_total, full_steps):
    start, total = start_and_total
    count = len(timesteps(start, full_steps, total))
    share = full_steps * start / total
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


def test_a_run_has_a_single_step_if_there_is_little_noise_or_one_step_in_all():
    assert timesteps(1, 100, 1000) == [1]
    assert timesteps(10, 20, 1000) == [10]
    assert timesteps(999, 1, 1000) == [999]


def test_more_steps_than_noise_takes_every_timestep():
    assert timesteps(7, 1000, 10) == [7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("start", [0, -1, 1000, 1001])
def test_a_start_outside_the_diffusion_is_refused(start):
    with pytest.raises(ValueError, match=rf"first timestep must be in \[1, 999\], not {start}"):
        timesteps(start, 20, 1000)


@pytest.mark.parametrize("full_steps", [0, -3])
def test_less_than_one_diffusion_step_is_refused(full_steps):
    with pytest.raises(ValueError, match=f"number of diffusion steps must be at least 1, not {full_steps}"):
        timesteps(500, full_steps, 1000)
