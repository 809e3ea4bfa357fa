"""Readers, the sentence splitter and the chunk sampler."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from cartridges_jax.corpus.chunks import Chunk, sample_chunks, token_coverage
from cartridges_jax.corpus.documents import Document, read_document
from cartridges_jax.corpus.questions import Question, questions_hash, read_questions
from cartridges_jax.corpus.sentences import split_sentences
from cartridges_jax.corpus.squad import read_squad_article
from cartridges_jax.errors import UserError

DATA = Path(os.environ.get("CARTRIDGES_JAX_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


class WordTokenizer:
    """A token is a run of visible characters; ids are hashes nobody looks at."""

    def encode_with_offsets(self, text):
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        return [hash(text[start:end]) for start, end in spans], spans

    def encode(self, text):
        return self.encode_with_offsets(text)[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# Documents


def test_a_document_has_the_files_name_and_text_whatever_its_line_ends_and_byte_order_mark(tmp_path):
    document = read_document(write(tmp_path / "hostel guide.md", b"\xef\xbb\xbf# Hostel\r\nK\xc3\xb8kken\r\n"))
    assert document == Document("hostel guide", "# Hostel\nKøkken")


def test_documents_have_equal_hashes_exactly_when_their_texts_are_equal():
    assert Document("a", "text").sha256 == Document("b", "text").sha256 != Document("a", "text ").sha256


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"PK\x03\x04\x00\x00", "binary (a NUL at byte 4)"),
        ("größer".encode("latin-1"), r"not UTF-8 (byte 2 is 0xf6); convert"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_that_is_no_text_is_refused_in_one_line_that_says_why(tmp_path, content, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        read_document(write(tmp_path / "file.txt", content))
    assert "file.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_document(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="is a directory"):
        read_document(tmp_path)


# Questions


def test_questions_are_read_with_distinct_answers_and_blank_lines_skipped(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        '{"question": "Who? ", "answers": ["A", "B", "A"], "evidence": "A."}\n\n{"question": "When?", "answers": ["now"]}\n',
    )
    assert read_questions(path) == [Question("Who?", ("A", "B"), "A."), Question("When?", ("now",))]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        ("[1]", "is a JSON list"),
        ('{"answers": ["x"]}', '"question": None'),
        ('{"question": " ", "answers": ["x"]}', "\"question\": ' '"),
        ('{"question": "Who?", "answers": []}', '"answers": []'),
        ('{"question": "Who?", "answers": "me"}', "\"answers\": 'me'"),
        ('{"question": "Who?", "answers": ["me", ""]}', "\"answers\": ['me', '']"),
        ('{"question": "Who?", "answers": ["me"], "evidence": 3}', '"evidence": 3'),
    ],
)
def test_a_bad_question_line_is_refused_with_its_number(tmp_path, line, complaint):
    path = write(tmp_path / "q.jsonl", '{"question": "Who?", "answers": ["me"]}\n' + line)
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        read_questions(path)
    assert "q.jsonl:2" in str(caught.value)


def test_the_questions_hash_changes_with_question_answers_and_order():
    a, b = Question("Who?", ("x",)), Question("When?", ("y",))
    variants = [[a, b], [b, a], [a], [a, Question("When?", ("z",))], [a, Question("When", ("y",))]]
    assert len({questions_hash(variant) for variant in variants}) == len(variants)
    assert questions_hash([a, b]) == questions_hash([Question("Who?", ("x",)), b])


# SQuAD


def squad_file(tmp_path: Path) -> Path:
    first, second = "Rollo came first. He was a duke.", "Later came William. William was a king."

    def item(question, context, *answers, **more):
        return {
            "question": question,
            "answers": [{"text": a, "answer_start": context.index(a)} for a in answers],
            **more,
        }

    paragraphs = [
        {"context": first, "qas": [item("Who came first?", first, "Rollo", "Rollo"), item("What was he?", first, "a duke", "duke")]},
        {"context": second, "qas": [
            item("Who came later?", second, "William"),
            item("What was William?", second, "a king"),
            item("Who came last?", second, is_impossible=True),
        ]},
    ]  # fmt: skip
    return write(tmp_path / "squad.json", json.dumps({"data": [{"title": "Dukes_of_N", "paragraphs": paragraphs}]}))


def test_a_squad_article_is_cut_at_a_sentence_end_and_keeps_the_questions_it_answers(tmp_path):
    document, questions = read_squad_article(
        squad_file(tmp_path), "dukes of n", max_tokens=12, tokenizer=WordTokenizer()
    )
    assert document == Document("Dukes of N", "Rollo came first. He was a duke.\n\nLater came William.")
    assert questions == [
        Question("Who came first?", ("Rollo",), "Rollo came first."),
        Question("What was he?", ("a duke", "duke"), "He was a duke."),
        Question("Who came later?", ("William",), "Later came William."),
    ]


def test_a_squad_article_within_the_budget_is_kept_whole_without_unanswerable_questions(tmp_path):
    document, questions = read_squad_article(
        squad_file(tmp_path), "Dukes_of_N", max_tokens=14, tokenizer=WordTokenizer()
    )
    assert document.text.endswith("William was a king.")
    assert [question.answers for question in questions] == [("Rollo",), ("a duke", "duke"), ("William",), ("a king",)]


def test_a_tokenizer_that_needs_more_tokens_for_a_prefix_still_gets_a_text_within_the_budget(tmp_path):
    class EndTokenizer(WordTokenizer):
        def encode(self, text):
            return [*super().encode(text), 0, 0, 0]

    document, _ = read_squad_article(squad_file(tmp_path), "Dukes_of_N", max_tokens=12, tokenizer=EndTokenizer())
    assert document.text.endswith("He was a duke.")


def test_an_unknown_title_is_refused_with_the_titles_there_are(tmp_path):
    with pytest.raises(UserError, match="no article 'Kings'; it has: Dukes_of_N"):
        read_squad_article(squad_file(tmp_path), "Kings", max_tokens=9, tokenizer=WordTokenizer())


def test_files_of_another_form_and_too_small_budgets_are_refused(tmp_path):
    for content in ("[]", '{"data": [{"paragraphs": []}]}', '{"data": [{"title": "T", "paragraphs": [{}]}]}'):
        with pytest.raises(UserError, match="is not SQuAD JSON"):
            read_squad_article(write(tmp_path / "x.json", content), "T", max_tokens=9, tokenizer=WordTokenizer())
    with pytest.raises(UserError, match="is not JSON"):
        read_squad_article(write(tmp_path / "x.json", "title,text"), "T", max_tokens=9, tokenizer=WordTokenizer())
    with pytest.raises(UserError, match="max_tokens = 2 does not hold the first sentence"):
        read_squad_article(squad_file(tmp_path), "Dukes_of_N", max_tokens=2, tokenizer=WordTokenizer())


def test_a_real_article_keeps_only_answers_that_its_text_holds():
    path = DATA / "squad_v2_dev_8_articles.json"
    if not path.exists():
        pytest.skip("squad_v2_dev_8_articles.json is not here; set CARTRIDGES_JAX_DATA to the folder that has it")
    whole, every = read_squad_article(path, "Normans", max_tokens=10**6, tokenizer=WordTokenizer())
    cut, some = read_squad_article(path, "Normans", max_tokens=600, tokenizer=WordTokenizer())
    assert whole.text.startswith(cut.text) and cut.text.endswith(".")
    assert 550 < len(WordTokenizer().encode(cut.text)) <= 600
    assert 0 < len(some) < len(every)
    for question in some:
        assert all(answer in cut.text for answer in question.answers)
        assert question.answers[0] in question.evidence


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


# Chunks


def test_chunks_have_lengths_in_bounds_and_stay_in_the_document():
    chunks = sample_chunks(1000, 400, min_tokens=50, max_tokens=90, seed=1)
    lengths = [chunk.num_tokens for chunk in chunks]
    assert len(chunks) == 400 and min(lengths) == 50 and max(lengths) == 90  # both bounds are drawn
    assert all(0 <= chunk.start and chunk.end <= 1000 for chunk in chunks)


def test_chunks_cover_a_document_evenly_where_uniform_starts_would_leave_holes():
    chunks = sample_chunks(10_000, 200, min_tokens=100, max_tokens=100, seed=3)
    assert token_coverage(chunks, 10_000) == 1.0
    random_starts = np.random.default_rng(3).integers(0, 9901, size=200)
    assert token_coverage([Chunk(start, start + 100) for start in random_starts], 10_000) < 0.95


def test_chunks_come_in_random_order_and_depend_on_the_seed_alone():
    chunks = sample_chunks(5000, 50, min_tokens=10, max_tokens=20, seed=7)
    assert chunks == sample_chunks(5000, 50, min_tokens=10, max_tokens=20, seed=7)
    assert chunks != sample_chunks(5000, 50, min_tokens=10, max_tokens=20, seed=8)
    starts = [chunk.start for chunk in chunks]
    assert starts != sorted(starts)


def test_a_document_shorter_than_a_chunk_is_the_chunk():
    assert sample_chunks(30, 3, min_tokens=50, max_tokens=90, seed=0) == [Chunk(0, 30)] * 3


@pytest.mark.parametrize(
    "bad", [{"num_tokens": 0}, {"num_chunks": -1}, {"min_tokens": 0}, {"min_tokens": 9, "max_tokens": 8}]
)
def test_chunk_sizes_that_make_no_sense_are_refused_with_their_values(bad):
    sizes = {"num_tokens": 100, "num_chunks": 3, "min_tokens": 5, "max_tokens": 8, "seed": 0} | bad
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        sample_chunks(sizes.pop("num_tokens"), sizes.pop("num_chunks"), **sizes)


def test_token_coverage_counts_a_token_once():
    assert token_coverage([Chunk(0, 5), Chunk(3, 6)], 10) == 0.6
    assert token_coverage([], 10) == 0.0
