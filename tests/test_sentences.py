"""The sentence splitter, on prose and on text that is not."""

import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartridges_jax.corpus.sentences import MOST_BYTES, split_sentences

# Sentences


def texts(text: str) -> list[str]:
    return [sentence.text for sentence in split_sentences(text)]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. Anna J. Smith runs it.", "She paid 3.50 euros."],
        ["It opens at 10 a.m.", "Breakfast is at 7 a.m. on weekdays."],
        ['"Who is it?" he asked.', '"Nobody."', "She left.[1]", "Then he slept."],
        ["The U.S. Army came.", "He lives in the U.S.", "The rest (cf. Fig. 3) is e.g. known."],
        ["Is it St. John's?", "No!", "It is St. Mary's..."],
        ["King George V.", "He died in 1936.", "12 kings came."],
        ["See p. 4 and No. 7.", "I said no.", "He agreed."],
    ],
)
def test_prose_is_split_at_sentence_ends_only(sentences):
    assert texts(" ".join(sentences)) == sentences


def test_sentences_of_scripts_without_spaces_are_split_at_their_full_stops():
    assert texts("今日は晴れです。明日は雨？「はい。」そう言った。") == [
        "今日は晴れです。",
        "明日は雨？",
        "「はい。」",
        "そう言った。",
    ]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Τι είναι αυτό;", "Είναι ένα νησί· μικρό.", "Πού;"],
        ["ما هذا؟", "إنها جزيرة.", "هل هي كبيرة؟"],
        ["یہ کیا ہے؟", "یہ ایک جزیرہ ہے۔", "وہ بڑا ہے۔"],
        ["यह क्या है?", "यह एक द्वीप है।", "वह बड़ा है।"],
        ["Սա կղզի է։", "Այն մեծ է։"],
    ],
)
def test_sentences_of_other_scripts_end_at_their_marks(sentences):
    assert texts(" ".join(sentences)) == sentences


def test_a_semicolon_between_latin_words_ends_no_sentence():
    assert texts("It came; it left.") == ["It came; it left."]


def test_a_sentence_runs_over_hard_line_breaks_but_not_over_blank_lines():
    assert texts("It came in\n1998. It\nleft\n\nNo full stop here\n\nEnd") == [
        "It came in\n1998.",
        "It\nleft",
        "No full stop here",
        "End",
    ]


def test_list_items_table_rows_and_code_lines_are_units_of_their_own():
    text = "Rooms:\n- One. Has a bed\n  and a lamp\n* Two\n1. First\n2. Second\n\n| a. B | c |\n| 1 | 2 |\n```\n# code\nx = 1. + Y\n```"
    assert texts(text) == [
        "Rooms:", "- One.", "Has a bed\n  and a lamp", "* Two", "1. First", "2. Second", "| a. B | c |", "| 1 | 2 |",
        "```", "# code", "x = 1. + Y", "```",
    ]  # fmt: skip


def test_headings_are_sentences_of_their_own_and_name_what_stands_under_them():
    found = split_sentences("Before.\n# The Hostel #\nOne. Two.\n\nRooms\n-----\nThree.\n---\nFour.")
    assert [(s.text, s.heading, s.heading_text) for s in found] == [
        ("Before.", False, None),
        ("# The Hostel #", True, "The Hostel"),
        ("One.", False, "The Hostel"),
        ("Two.", False, "The Hostel"),
        ("Rooms\n-----", True, "Rooms"),
        ("Three.", False, "Rooms"),
        ("---", False, "Rooms"),  # under a full sentence a line of dashes is a rule
        ("Four.", False, "Rooms"),
    ]


def test_a_line_of_markup_alone_has_no_words():
    assert [sentence.has_words for sentence in split_sentences("A.\n\n---\n\n| x |\n|---|")] == [
        True,
        False,
        True,
        False,
    ]


# Texts that are not prose: a sentence of each would be the whole text.
NOT_PROSE = {
    "csv": "\n".join(f"id{row},alpha,{row * 7},foo-bar,2024-01-{row % 28:02},free text" for row in range(60)),
    "no punctuation": "words that follow each other and never stop " * 200,
    "minified JSON": '{"name":"x","values":[1,2,3],"nested":{"a":null}},' * 200,
    "log": "\n".join(f"12:00:{row % 60:02} INFO worker-{row} started in /srv/app" for row in range(200)),
    "Thai": "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน" * 40,
    "one word": "x" * 9000,
    "code": "```\n" + "value=compute(a,b);" * 300 + "\n```",
    "table row": "| " + "cell | " * 600,
    "heading": "# " + "long heading " * 300,
    "carriage returns": "a line without a stop\r" * 300,
    "family emoji": "👩‍👩‍👧" * 500,
    "lone surrogates": "\ud800" * 2000,
}


@settings(max_examples=1000, deadline=5000, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [
                "# ",
                "- ",
                "1. ",
                "| ",
                "```",
                "---",
                "===",
                "\n",
                "\n\n",
                "\r",
                " ",
                "\u2028",
                ". ",
                "。",
                "Mr. ",
                ";",
                "x" * 700,
            ]
        )
        | st.text(max_size=300),
        max_size=30,
    )
)
def test_any_text_is_covered_by_sentences_of_bounded_length(parts):
    text = "".join(parts)
    position = 0
    for sentence in split_sentences(text):
        assert not text[position : sentence.start].strip() and sentence.text == text[sentence.start : sentence.end]
        assert sentence.text.strip() == sentence.text != ""
        assert len(sentence.text.encode("utf-8", "surrogatepass")) <= MOST_BYTES
        position = sentence.end
    assert not text[position:].strip()


@pytest.mark.parametrize("kind", NOT_PROSE)
def test_a_sentence_has_an_upper_length_whatever_the_text(kind):
    text = NOT_PROSE[kind]
    found = split_sentences(text)
    assert max(len(s.text.encode("utf-8", "surrogatepass")) for s in found) <= MOST_BYTES
    assert "".join("".join(s.text.split()) for s in found) == "".join(text.split())
    assert all(text[s.start : s.end] == s.text for s in found)
    # Few pieces more than there have to be.
    assert len(found) <= 3 + 2 * len(text.encode("utf-8", "surrogatepass")) / MOST_BYTES
    assert all(len(s.heading_text or "") <= MOST_BYTES for s in found)


def test_a_long_text_is_cut_at_line_ends_else_at_separators_else_between_letters():
    assert all(s.text.startswith("id") for s in split_sentences(NOT_PROSE["csv"]))
    assert all(s.text[-1] in ",:]}" for s in split_sentences(NOT_PROSE["minified JSON"]))
    assert all(s.text.split()[-1] in NOT_PROSE["log"].split() for s in split_sentences(NOT_PROSE["log"]))
    # A vowel sign stays with its consonant, and a family together.
    assert not any(unicodedata.category(s.text[0]).startswith("M") for s in split_sentences(NOT_PROSE["Thai"]))
    assert all(s.text[0] == "👩" and s.text[-1] == "👧" for s in split_sentences(NOT_PROSE["family emoji"]))


@pytest.mark.parametrize(
    "unit",
    [
        "The fox runs.\nThen it goes\nhome to the U.S. again. ", "a\n===\nb c\n", "x. " + " " * 50, "...", "a.) ", "* ",
        "no stop and no blank line\n", "# ", "..x",
    ],
)  # fmt: skip
def test_splitting_takes_time_in_proportion_to_the_text(unit):
    """Of 2 MB; where the time grows with the square it is an hour and more."""
    text = unit * (2_000_000 // len(unit))
    start = time.process_time()
    split_sentences(text)
    assert time.process_time() - start < 30


def test_every_visible_character_is_in_exactly_one_sentence():
    pieces = [
        "# H",
        "a. B",
        "- x",
        "1. y",
        "| t |",
        "---",
        "===",
        "",
        " ",
        "```",
        "c",
        "„Ja.“ Nein!",
        "晴れ。雨",
        "\u2028",
        "e.g. X",
        "...",
        "Mr. A",
        "\t",
    ]
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "\n".join(random.choice(pieces, size=random.integers(1, 12)))
        covered = np.zeros(len(text), dtype=int)
        for sentence in split_sentences(text):
            assert text[sentence.start : sentence.end] == sentence.text == sentence.text.strip() != ""
            covered[sentence.start : sentence.end] += 1
        assert covered.max(initial=0) <= 1
        assert all(covered[index] == 1 for index, character in enumerate(text) if not character.isspace()), repr(text)
