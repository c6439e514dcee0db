import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit._engine.ledger import Check
from robustkit.flags import FLAGS, LEVEL, NOTES, flags_and_notes, lower_bound, p_value


def tail(hits, of, share):
    """The probability of at least `hits` hits, term by term."""
    return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(hits, of + 1))


COUNTS = st.integers(1, 60).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of)))


@given(COUNTS, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_the_p_value_is_the_tail_of_the_binomial(counts, limit):
    assert p_value(Check("x", *counts, limit)) == pytest.approx(tail(*counts, limit), abs=1e-12)


@given(COUNTS)
def test_the_lower_bound_is_the_share_at_which_the_p_value_is_the_level(counts):
    bound = lower_bound(*counts)
    if counts[0]:
        assert tail(*counts, bound) == pytest.approx(LEVEL, abs=1e-9)
    else:
        assert bound == 0


@given(COUNTS)
def test_a_single_test_raises_a_flag_exactly_where_the_bound_exceeds_the_limit(counts):
    """Two equivalent statements: "the lower bound exceeds 1 %" and "p is at most 5 % for a share of 1 %"."""
    flags, _ = flags_and_notes([Check("gradient-free-breaks", *counts, 0.01)])
    if abs(lower_bound(*counts) - 0.01) > 1e-9:
        assert bool(flags) is (lower_bound(*counts) > 0.01)


def test_checks_of_several_batches_are_summed_before_the_test():
    part = Check("gradient-free-breaks", 2, 50, 0.01)
    assert not flags_and_notes([part])[0]
    (flag,), _ = flags_and_notes([part] * 4)
    assert flag.name == "gradient-free-breaks"
    assert "8 of 200" in flag.why


def test_holm_corrects_for_the_number_of_tests():
    weak = Check("more-steps-leave-more", 5, 5)  # p = 1/32
    assert len(flags_and_notes([weak])[0]) == 1
    others = [Check(rule.name, 0, 10) for rule in FLAGS[:4]]
    assert not flags_and_notes([weak, *others])[0]
    strong = Check("gradients-disagree", 64, 64)
    assert [flag.name for flag in flags_and_notes([*others, strong, weak])[0]] == ["gradients-disagree"]
    # Step down: after the strong one is rejected, fewer tests share the level.
    assert len(flags_and_notes([strong, weak])[0]) == 2


def test_a_single_hit_is_enough_where_the_limit_is_zero():
    assert [flag.name for flag in flags_and_notes([Check("undefined-outputs", 1, 10_000, 0.0)])[0]] == ["undefined-outputs"]
    assert not flags_and_notes([Check("undefined-outputs", 0, 10_000, 0.0)])[0]


def test_no_checks_give_no_messages():
    assert flags_and_notes([]) == ([], [])
    assert flags_and_notes([Check(rule.name, 0, 0) for rule in (*FLAGS, *NOTES)]) == ([], [])


def test_a_note_needs_hits_in_most_cases():
    assert not flags_and_notes([Check("probabilities", 5, 10)])[1]
    (note,) = flags_and_notes([Check("probabilities", 6, 10)])[1]
    assert "6 of 10" in note.why


def test_names_are_unique_and_messages_have_one_line():
    names = [rule.name for rule in (*FLAGS, *NOTES)]
    assert len(set(names)) == len(names)
    for rule in (*FLAGS, *NOTES):
        assert "\n" not in rule.message(Check(rule.name, 3, 7)).why


@given(st.lists(st.sampled_from(FLAGS), unique=True, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_the_checks_does_not_matter(rules, random):
    checks = [Check(rule.name, random.randint(0, 20), 20, random.choice([0.01, 0.5])) for rule in rules]
    shuffled = random.sample(checks, len(checks))
    assert flags_and_notes(checks) == flags_and_notes(shuffled)


def test_a_note_needs_a_minimum_number_of_cases():
    assert [[note.name for note in flags_and_notes([Check("plateau", hits, hits)])[1]] for hits in (4, 5)] == [[], ["plateau"]]
    assert [note.name for note in flags_and_notes([Check("boundary-breaks", 1, 1)])[1]] == [
        "boundary-breaks"
    ]  # one batch is enough
