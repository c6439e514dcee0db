import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit._engine.ledger import Check
from robustkit.flags import FLAGS, LEVEL, NOTES, flags_and_notes, lower_bound, p_value


def tail(hits, of, share):
    """The chance of at least so many hits, term by term."""
    return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(hits, of + 1))


COUNTS = st.integers(1, 60).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of)))


@given(COUNTS, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_the_p_value_is_the_tail_of_the_binomial(counts, limit):
    assert p_value(Check("x", *counts, limit)) == pytest.approx(tail(*counts, limit), abs=1e-12)


@given(COUNTS)
def test_the_bound_is_the_share_at_which_so_many_hits_are_just_improbable(counts):
    bound = lower_bound(*counts)
    if counts[0]:
        assert tail(*counts, bound) == pytest.approx(LEVEL, abs=1e-9)
    else:
        assert bound == 0


@given(COUNTS)
def test_one_test_alone_alarms_exactly_where_the_bound_exceeds_the_limit(counts):
    """The two ways to say it: "the lower bound exceeds 1 %" and "p is at most 5 % for a share of 1 %"."""
    flags, _ = flags_and_notes([Check("gradient-free-breaks", *counts, 0.01)])
    if abs(lower_bound(*counts) - 0.01) > 1e-9:
        assert bool(flags) is (lower_bound(*counts) > 0.01)


def test_evidence_of_several_batches_is_judged_together():
    part = Check("gradient-free-breaks", 2, 50, 0.01)
    assert not flags_and_notes([part])[0]
    (flag,), _ = flags_and_notes([part] * 4)
    assert flag.name == "gradient-free-breaks"
    assert "8 of 200" in flag.why


def test_holm_asks_more_of_each_the_more_there_are():
    weak = Check("more-steps-leave-more", 5, 5)  # p = 1/32
    assert len(flags_and_notes([weak])[0]) == 1
    others = [Check(sign.name, 0, 10) for sign in FLAGS[:4]]
    assert not flags_and_notes([weak, *others])[0]
    strong = Check("gradients-disagree", 64, 64)
    assert [flag.name for flag in flags_and_notes([*others, strong, weak])[0]] == ["gradients-disagree"]
    # Step down: once the strong ones are out of the way, fewer are left to share the level.
    assert len(flags_and_notes([strong, weak])[0]) == 2


def test_a_single_case_is_enough_where_a_sound_model_has_none():
    assert [flag.name for flag in flags_and_notes([Check("undefined-outputs", 1, 10_000, 0.0)])[0]] == ["undefined-outputs"]
    assert not flags_and_notes([Check("undefined-outputs", 0, 10_000, 0.0)])[0]


def test_nothing_seen_is_nothing_told():
    assert flags_and_notes([]) == ([], [])
    assert flags_and_notes([Check(sign.name, 0, 0) for sign in (*FLAGS, *NOTES)]) == ([], [])


def test_notes_are_told_of_most_cases():
    assert not flags_and_notes([Check("probabilities", 5, 10)])[1]
    (note,) = flags_and_notes([Check("probabilities", 6, 10)])[1]
    assert "6 of 10" in note.why


def test_names_are_a_fixed_list_without_doubles():
    names = [sign.name for sign in (*FLAGS, *NOTES)]
    assert len(set(names)) == len(names)
    for sign in (*FLAGS, *NOTES):
        assert "\n" not in sign.message(Check(sign.name, 3, 7)).why


@given(st.lists(st.sampled_from(FLAGS), unique=True, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_the_evidence_does_not_matter(signs, random):
    checks = [Check(sign.name, random.randint(0, 20), 20, random.choice([0.01, 0.5])) for sign in signs]
    shuffled = random.sample(checks, len(checks))
    assert flags_and_notes(checks) == flags_and_notes(shuffled)


def test_a_share_of_a_few_examples_is_not_worth_a_note():
    assert [[note.name for note in flags_and_notes([Check("plateau", hits, hits)])[1]] for hits in (4, 5)] == [[], ["plateau"]]
    assert [note.name for note in flags_and_notes([Check("boundary-breaks", 1, 1)])[1]] == [
        "boundary-breaks"
    ]  # of batches one is enough
