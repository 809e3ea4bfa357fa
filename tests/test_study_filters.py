"""The filters of self-study: what the small-model recipe drops, and what it must not."""

from __future__ import annotations

import dataclasses

import pytest

from cartridges_jax.selfstudy.filters import Candidate, degenerates, is_about, reason_to_drop
from cartridges_jax.selfstudy.settings import PAPER, SynthesisSettings
from cartridges_jax.selfstudy.teacher import Reply

SMALL = SynthesisSettings()
SOURCE = "The hostel is open from April to October."

JSON_LIST = """[
  {"name": "Shed 1", "year": 1990, "open": true},
  {"name": "Shed 2", "year": 1991, "open": true},
  {"name": "Shed 3", "year": 1992, "open": true}
]"""
ONE_LINE_JSON = 'Here it is: [{"shed": "1", "year": 1990}, {"shed": "2", "year": 1991}, {"shed": "3", "year": 1992}]'
TABLE = """| Shed | Year | Place |
|------|------|-------|
| Shed 1 | 1990 | North quay |
| Shed 2 | 1991 | North quay |
| Shed 3 | 1992 | North quay |"""
NUMBERED = """The sheds are:
1. The shed on the north quay is open from April to June.
2. The shed on the north pier is open from April to July.
3. The shed on the north bank is open from April to August."""
STRUCTURED = {"json": JSON_LIST, "one_line_json": ONE_LINE_JSON, "table": TABLE, "numbered": NUMBERED}


def by_characters(text: str) -> Reply:
    """An answer in tokens of one character, in which structure repeats most."""
    return Reply(text, [ord(character) for character in text], None, "stop")


def reason(message: str, *, family: str = "qa", source: str | None = None, settings: SynthesisSettings = SMALL, **more):
    return reason_to_drop(Candidate(family, message, source or message, **more), settings)


@pytest.mark.parametrize(
    ("text", "family", "found"),
    [
        ("Who opens the door?", "qa", None), ("Who opens the door", "qa", "question_mark"),
        ("Who opens?", "qa", "length"), ("Why " + "so " * 17 + "late?", "qa", "length"),
        ("Why " + "so " * 16 + "late?", "qa", None), ("Sum up the rules", "summarization", None),
        ("word " * 40, "generic", None), ("word " * 41, "generic", "length"),
        ("When does the bakery on Mill Lane open?", "qa", "echo"),
    ],
)  # fmt: skip
def test_fragments_essays_and_echoes_of_the_examples_are_dropped_by_name(text, family, found):
    assert reason(text.strip(), family=family) == found
    assert reason(text.strip(), family=family, settings=PAPER) is None


@pytest.mark.parametrize(
    ("message", "about"),
    [
        ("When is the hostel open in April?", True),
        ("Where do I buy cheese?", False),
        ("Which hostel?", True),
        ("When does the hostel close and who has the key to its cellar?", False),
        ("Is it?", False),
        ("Does the HOSTEL'S season run to Octobers?", True),
    ],
)
def test_a_message_is_about_a_sentence_when_it_shares_enough_content(message, about):
    assert is_about(message, SOURCE) is about


def test_messages_off_the_subject_and_duplicates_are_dropped_unless_the_filters_are_not_chosen():
    assert reason("Where can I buy cheese?", source=SOURCE) == "about"
    without = dataclasses.replace(SMALL, filters=("length", "duplicate"))
    assert reason("Where can I buy cheese?", source=SOURCE, settings=without) is None
    asked = {"who opens door"}
    assert reason("Who opens the door?", asked=asked) == reason("Who opens a door?", asked=asked) == "duplicate"
    assert reason("Who opens the door?", asked=asked, settings=PAPER) is None


def test_the_limits_of_the_filters_are_settings():
    assert reason("Who opens the door?", settings=dataclasses.replace(SMALL, min_words=5)) == "length"
    assert reason("Who opens the door?", settings=dataclasses.replace(SMALL, question_max_words=3)) == "length"
    strict = dataclasses.replace(SMALL, about_min_words=5)
    assert reason("When is the hostel open and who has the key to its cellar?", source=SOURCE) is None
    assert (
        reason("When is the hostel open and who has the key to its cellar?", source=SOURCE, settings=strict) == "about"
    )


def test_an_answer_degenerates_when_four_tokens_come_back_three_times():
    once = [1, 2, 3, 4, 9]
    assert not degenerates(once * 2) and degenerates(once * 3)
    assert degenerates([7] * 6) and not degenerates([7] * 5) and not degenerates([])
    assert degenerates(once * 2, times=2) and not degenerates(once * 3, span=6, times=3)


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("settings", [PAPER, SMALL], ids=["paper", "small"])
def test_structured_answers_are_not_taken_for_repetition(name, settings):
    answer = by_characters(STRUCTURED[name])
    # As prose, each would be.
    assert degenerates(answer.token_ids)
    assert reason("Which sheds are open?", answer=answer, settings=settings) is None


@pytest.mark.parametrize(
    "text",
    [
        "- Shed 1 is open.\n- Shed 1 is open.\n- Shed 1 is open.",
        "1. Shed 1 is open.\n2. Shed 1 is open.\n3. Shed 1 is open.",
        "| Shed 1 | 1990 |\n| Shed 1 | 1990 |\n| Shed 1 | 1990 |",
        '[{"shed": "1"}, {"shed": "1"}, {"shed": "1"}]',
        "- It is open and it is open and it is open and it is open and so on.\n- Shed 2.",
        "It is open and it is open and it is open and it is open.",
    ],
)
def test_lists_and_tables_that_repeat_themselves_are_still_dropped_for_small_models(text):
    assert reason("Which sheds are open?", answer=by_characters(text)) == "repetition"
    assert reason("Which sheds are open?", answer=by_characters(text), settings=PAPER) is None
