"""The schedule: phases, order of views, noise levels."""

from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.training.schedule import (
    Phase,
    PhaseSchedule,
    strength_of_edit,
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
        level = strength_of_edit(seed, number, 0.02, 0.98)
        return view_of_edit(seed, number, num_views), level

    first = draw()
    for other in range(5):
        view_of_edit(other, other, num_views)
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
    assert strength_of_edit(0, 0, 0.0, 1.0) == 0.4333551030570951


@given(seeds, st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_noise_levels_stay_in_their_range(seed, number, a, b):
    low, high = min(a, b), max(a, b)
    assert low <= strength_of_edit(seed, number, low, high) <= high


def test_noise_levels_are_spread_evenly_over_their_range():
    levels = [strength_of_edit(1, number, 0.2, 0.8) for number in range(3000)]
    counts = [sum(0.2 + 0.1 * i <= level < 0.3 + 0.1 * i for level in levels) for i in range(6)]
    assert all(400 < count < 600 for count in counts)  # 500 expected, standard deviation 20
