"""Answer scores against values worked out by hand, and the fraction of a gap that is closed."""

import math

import pytest

from cartridges_jax.evaluation.metrics import closed_fraction, contains_answer, exact_match, normalise_answer, token_f1


def test_normalising_an_answer_drops_case_punctuation_articles_and_extra_space():
    assert normalise_answer("  The  Duke’s “castle”, a ruin\n(1066)!") == "dukes castle ruin 1066"
    assert normalise_answer("another theme") == "another theme"  # articles go as whole words only


def test_token_f1_is_that_of_the_best_answer():
    # 2 common words of 3 predicted and 2 referenced: 2·2 / (3 + 2)
    assert token_f1("the old Maren Holt", ["somebody", "Maren Holt"]) == pytest.approx(0.8)
    assert token_f1("at the the", ["At"]) == 1.0
    assert token_f1("ten ten", ["ten"]) == pytest.approx(2 / 3)  # repeated words count once each
    assert token_f1("nine", ["ten"]) == 0.0


def test_empty_predictions_match_only_answers_without_words():
    assert token_f1("", ["ten"]) == 0.0
    assert token_f1("the", ["."]) == 1.0


def test_exact_match_ignores_what_normalising_drops_and_nothing_else():
    assert exact_match("the Duke.", ["duke", "king"]) == 1.0
    assert exact_match("a duke of N", ["duke"]) == 0.0


def test_an_answer_is_contained_as_whole_words_only():
    assert contains_answer("It closes at half past nine.", ["21:30", "half past nine"])
    assert not contains_answer("There are 142 beds.", ["42"])
    assert not contains_answer("anything", ["the"])


@pytest.mark.parametrize("score", [token_f1, exact_match])
@pytest.mark.parametrize("answers", [[], "one string"])
def test_scoring_against_no_list_of_answers_is_refused(score, answers):
    with pytest.raises(ValueError, match="give a list"):
        score("x", answers)


def test_closed_fraction_is_one_at_the_reference_zero_at_nothing_and_negative_below():
    assert closed_fraction(2.5, 0.5, 0.5) == (1.0, None)
    assert closed_fraction(2.5, 2.5, 0.5) == (0.0, None)
    assert closed_fraction(2.5, 1.0, 0.5) == (0.75, None)
    assert closed_fraction(2.5, 3.5, 0.5) == (-0.5, None)


def test_closed_fraction_of_a_kl_is_one_minus_its_share():
    fraction, _ = closed_fraction(1.441, 0.387, 0.0)
    assert fraction == pytest.approx(1 - 0.387 / 1.441)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((0.5, 0.4, 0.5), "no better than having no document"),
        ((0.4, 0.4, 0.5), "no better than having no document"),
        ((None, 0.4, 0.5), "'none' is missing"),
        ((1.0, math.nan, 0.5), "'condition' is nan"),
        ((1.0, 0.7, math.inf), "'reference' is inf"),
    ],
)
def test_an_undefined_fraction_is_none_with_a_reason(values, reason):
    fraction, given = closed_fraction(*values)
    assert fraction is None and reason in given
