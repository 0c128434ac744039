"""The schedule of a run: phases, view order and strengths of the edits."""

from hypothesis import given
from hypothesis import strategies as st

from wys_nerfstudio.training.schedule import Phase, PhaseSchedule, strength_of_edit, view_of_edit

schedules = st.builds(PhaseSchedule, st.integers(0, 20), st.integers(0, 10), st.integers(0, 30))
seeds = st.integers(-(2**40), 2**40)


@given(schedules)
def test_phases_cover_the_schedule_exactly_and_in_order(schedule):
    expected = [Phase.RECONSTRUCT] * schedule.reconstruct_steps + [Phase.LOCALIZE] * schedule.localize_steps
    expected += [Phase.EDIT] * schedule.edit_steps
    assert schedule.total_steps == len(expected)
    assert [schedule.phase(step) for step in range(schedule.total_steps)] == expected


@given(schedules, st.integers(0, 1000))
def test_steps_past_the_end_belong_to_the_edit_phase(schedule, excess):
    assert schedule.phase(schedule.total_steps + excess) is Phase.EDIT


@given(schedules, st.integers(1, 7))
def test_edits_are_due_at_regular_steps_of_the_edit_phase(schedule, every):
    due = [step for step in range(schedule.total_steps) if schedule.edits_due(step, every)]
    assert due == list(range(schedule.edit_start, schedule.total_steps, every))


def test_phases_are_named_as_in_the_documentation():
    assert [phase.value for phase in Phase] == ["reconstruct", "localize", "edit"]


@given(seeds, st.integers(1, 30), st.integers(0, 5))
def test_every_view_is_edited_once_per_round(seed, num_views, edit_round):
    numbers = range(edit_round * num_views, (edit_round + 1) * num_views)
    assert sorted(view_of_edit(seed, number, num_views) for number in numbers) == list(range(num_views))


@given(seeds, st.integers(0, 500), st.integers(1, 50))
def test_view_and_strength_depend_on_seed_and_number_alone(seed, number, num_views):
    def draw() -> tuple[int, float]:
        return view_of_edit(seed, number, num_views), strength_of_edit(seed, number, 0.02, 0.98)

    first = draw()
    for other in range(5):
        view_of_edit(other, other, num_views)
        strength_of_edit(other, other, 0.02, 0.98)
    assert draw() == first


def test_view_orders_differ_between_rounds_and_seeds():
    orders = {
        tuple(view_of_edit(seed, edit_round * 20 + i, 20) for i in range(20))
        for seed in range(3)
        for edit_round in range(10)
    }
    assert len(orders) == 30


def test_draws_are_equal_on_all_machines_and_in_all_releases():
    # A resumed run must match the uninterrupted one, also after an upgrade: these numbers must never change.
    assert [view_of_edit(0, i, 6) for i in range(6)] == [0, 2, 1, 3, 4, 5]
    assert strength_of_edit(0, 0, 0.0, 1.0) == 0.4333551030570951


@given(seeds, st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_strengths_stay_in_their_range(seed, number, a, b):
    low, high = min(a, b), max(a, b)
    assert low <= strength_of_edit(seed, number, low, high) <= high


def test_strengths_are_uniform_over_their_range():
    strengths = [strength_of_edit(1, number, 0.2, 0.8) for number in range(3000)]
    counts = [sum(0.2 + 0.1 * i <= strength < 0.3 + 0.1 * i for strength in strengths) for i in range(6)]
    assert all(400 < count < 600 for count in counts)  # 500 expected, standard deviation 20
