"""Training questions that resemble evaluation questions are found, others are not."""

import numpy as np
import pytest

from cartridges_jax.data.decontaminate import is_near_duplicate, normalise, split_contaminated

ASKED = "Who keeps the lost property?"


def test_normalising_keeps_content_words_in_order():
    assert normalise("Who's keeping THE hostel’s “Lost-Property”, of which?") == "who keeping hostel lost property what"
    assert normalise("Who is it?") == "who"
    assert normalise("Is it?") == "is it"  # nothing has content: everything stays


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (ASKED, "Who keeps lost property?"),
        (ASKED, "who keeps lost property at the hostel?"),
        (ASKED, "At the hostel, who keeps the lost property"),
        ("In what country is Normandy located?", "Which country is Normandy in?"),
        ("鍵はどこですか？", "鍵はどこですか"),
    ],
)
def test_the_same_question_in_nearly_the_same_words_is_a_near_duplicate(a, b):
    assert is_near_duplicate(a, b) and is_near_duplicate(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (ASKED, "Who keeps the keys?"),
        (ASKED, "Where is lost property found?"),
        ("Did Rollo pay Charles?", "Did Charles pay Rollo?"),
        ("When does the kitchen open?", "When does the kitchen close?"),
        ("What time does breakfast start on Sunday?", "What time does breakfast start on Saturday?"),
        (ASKED, ""),
        ("", ""),
    ],
)
def test_another_question_is_no_near_duplicate(a, b):
    assert not is_near_duplicate(a, b) and not is_near_duplicate(b, a)


def test_the_threshold_decides_what_counts_as_near():
    other = "Who keeps lost property at the hostel?"
    assert is_near_duplicate(ASKED, other, threshold=0.85) and not is_near_duplicate(ASKED, other, threshold=0.95)


def test_contaminated_questions_are_split_off_by_index():
    questions = [
        "Who keeps the keys?",
        "who keeps lost property",
        "How many beds are there?",
        "How many beds are there??",
    ]
    assert split_contaminated(questions, [ASKED, "How many beds are there?"]) == ([0], [1, 2, 3])
    assert split_contaminated(questions, []) == ([0, 1, 2, 3], [])
    assert split_contaminated([], questions) == ([], [])


def test_of_two_thousand_questions_the_one_that_equals_one_of_a_hundred_is_dropped():
    random = np.random.default_rng(0)
    words = [f"word{index}" for index in range(120)]
    questions = [" ".join(random.choice(words, size=10)) for _ in range(2100)]
    clean, dropped = split_contaminated([*questions[:2000], questions[2000]], questions[2000:])
    assert dropped == [2000] and len(clean) == 2000
