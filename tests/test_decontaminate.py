"""Training questions that resemble evaluation questions are found, others are not."""

import numpy as np
import pytest

from cartridges_jax.data.decontaminate import (
    NEAR_DUPLICATE_THRESHOLD,
    is_near_duplicate,
    normalise,
    split_contaminated,
    split_conversations,
)

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


@pytest.mark.parametrize("threshold", [0.5, NEAR_DUPLICATE_THRESHOLD, 0.95])
def test_the_index_finds_what_comparing_every_pair_finds(rng, threshold):
    """Questions of few words, so that many pairs are near the threshold and words repeat."""
    words = ["beds", "keys", "who", "what", "hostel", "the", "open", "sunday"]
    questions, asked = (
        [" ".join(rng.choice(words, size=int(rng.integers(0, 8)))) for _ in range(count)] for count in (250, 40)
    )
    contaminated = [i for i, q in enumerate(questions) if any(is_near_duplicate(q, a, threshold) for a in asked)]
    assert 0 < len(contaminated) < 250
    assert split_contaminated(questions, asked, threshold)[1] == contaminated


# Conversations


class Draws:
    """In place of a generator: draws the given conversations first."""

    def __init__(self, *drawn):
        self._drawn = drawn

    def permutation(self, count):
        return [*self._drawn, *(number for number in range(count) if number not in self._drawn)]


def test_training_asks_no_evaluation_question_and_holding_out_no_training_question():
    conversations = [
        ["Who keeps the keys?"],
        ["who keeps lost property"],  # an evaluation question
        ["How many beds are there?"],
        ["How many beds are there??"],  # drawn, and asked in training
        ["When does the kitchen open?"],  # drawn
        ["Tell me more.", "At the hostel, who keeps the lost property?"],  # an evaluation question, later
    ]
    split = split_conversations(conversations, [ASKED], 2, Draws(3, 4))
    assert (split.training, split.heldout) == ([0, 2], [4])
    assert split.dropped == {"like_evaluation": 2, "like_training": 1}


def test_a_held_out_conversation_stays_if_one_of_its_questions_is_new():
    conversations = [["Tell me more."], ["Tell me more.", "When does the kitchen open?"], ["Tell me more."]]
    split = split_conversations(conversations, [], 2, Draws(1, 2))
    assert (split.training, split.heldout) == ([0], [1])
    assert split.dropped == {"like_evaluation": 0, "like_training": 1}


def test_what_is_dropped_from_training_does_not_decide_what_is_held_out():
    split = split_conversations([[ASKED], [ASKED], ["Where is it?"]], [ASKED], 1, Draws(1))
    assert (split.training, split.heldout) == ([2], [1])


def test_the_draw_is_a_function_of_the_generator_and_every_conversation_is_accounted_for():
    conversations = [[f"Where is thing number {number}?"] for number in range(50)]
    one, again, other = (
        split_conversations(conversations, [], 10, np.random.default_rng([seed, 1])) for seed in (0, 0, 1)
    )
    assert one == again and one.heldout != other.heldout
    assert len(one.heldout) == 10 and sorted(one.training + one.heldout) == list(range(50))
    assert split_conversations([], [ASKED], 3, np.random.default_rng(0)).training == []
