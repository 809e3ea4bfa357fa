"""Readers, the sentence splitter and the chunk sampler."""

import dataclasses
import json
import os
import re
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartridges_jax.corpus import Corpus, Document, read_corpus, readers, tokenize_corpus
from cartridges_jax.corpus.chunks import Chunk, sample_chunks, token_coverage
from cartridges_jax.corpus.questions import Question, questions_hash, read_questions
from cartridges_jax.corpus.sentences import MOST_BYTES, split_sentences
from cartridges_jax.errors import UserError

DATA = Path(os.environ.get("CARTRIDGES_JAX_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


class WordTokenizer:
    """A token is a run of visible characters; ids are hashes nobody looks at."""

    def encode_with_offsets(self, text):
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        return [hash(text[start:end]) % 1000 for start, end in spans], spans

    def encode(self, text):
        return self.encode_with_offsets(text)[0]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# Documents


def test_a_document_has_the_files_name_and_text_whatever_its_line_ends_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "hostel guide.md", b"\xef\xbb\xbf# Hostel\r\nK\xc3\xb8kken\r\n")
    assert read_corpus(path).documents == (Document("hostel guide", "# Hostel\nKøkken", source=str(path)),)


def test_a_suffix_that_names_no_format_belongs_to_the_documents_name(tmp_path):
    assert read_corpus(write(tmp_path / "Apache-2.0", "Terms.")).name == "Apache-2.0"
    assert read_corpus(write(tmp_path / "notes.txt", "Notes.")).name == "notes"


def test_a_folder_a_glob_and_a_list_become_one_corpus_in_order(tmp_path):
    for name in ("b.md", "a.txt", "deep/a.txt", "deep/c.bin", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, f"Text of {name}.")
    folder = read_corpus(tmp_path)
    assert [document.text for document in folder] == ["Text of a.txt.", "Text of b.md.", "Text of deep/a.txt."]
    assert len({document.id for document in folder}) == 3
    assert read_corpus(str(tmp_path / "*.*")).text == "a\n\nText of a.txt.\n\nb\n\nText of b.md."
    both = f"{tmp_path / 'b.md'},{tmp_path / 'a.txt'}"
    for listed in (both, both.split(",")):
        assert [document.name for document in read_corpus(listed)] == ["b", "a"]
    assert read_corpus(both).sha256 != read_corpus(tmp_path).sha256
    with_comma = write(tmp_path / "one,two.txt", "Both.")
    assert read_corpus(str(with_comma)).name == "one,two"


def test_a_corpus_comes_from_a_pipe_that_can_be_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("Some text.\n",))
    writer.start()
    assert read_corpus(str(tmp_path / "pipe")).text == "Some text."
    writer.join()


def test_a_reader_that_is_registered_reads_the_files_of_its_suffix(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READERS", dict(readers.READERS))

    @readers.register(".rows")
    def read_rows(path, data):
        return [Document(f"row {number}", line) for number, line in enumerate(data.decode().splitlines())]

    corpus = read_corpus(write(tmp_path / "x.ROWS", "one\ntwo"))
    assert corpus.documents == (Document("row 0", "one"), Document("row 1", "two"))


def test_documents_with_one_id_and_names_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="two documents have the id 'a'"):
        Corpus((Document("a", "x"), Document("a", "y")))
    with pytest.raises(UserError, match="no document 'c'; it has: a, b"):
        Corpus((Document("a", "x"), Document("b", "y"))).select("a, c")
    with pytest.raises(UserError, match="no documents"):
        Corpus(())


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
        read_corpus(write(tmp_path / "file.txt", content))
    assert "file.txt" in str(caught.value) and "\n" not in str(caught.value)


def test_what_names_no_readable_file_is_refused(tmp_path):
    for source in (tmp_path / "nowhere.txt", f"{tmp_path}/a.txt,{tmp_path}/b.txt"):
        with pytest.raises(UserError, match="does not exist"):
            read_corpus(source)
    with pytest.raises(UserError, match="holds no file with one of the suffixes .txt"):
        read_corpus(tmp_path)
    with pytest.raises(UserError, match="no file matches"):
        read_corpus(f"{tmp_path}/*.txt")
    for nothing in ("", []):
        with pytest.raises(UserError, match="names no file"):
            read_corpus(nothing)


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


def squad_article(path, title, max_tokens, tokenizer=None):
    """One article of a file, cut: the document without its questions, and these without their spans."""
    corpus = tokenize_corpus(read_corpus(path).select(title), tokenizer or WordTokenizer(), max_tokens=max_tokens)
    (document,) = corpus.corpus
    questions = [dataclasses.replace(question, spans=()) for question in document.questions]
    return Document(document.name, document.text), questions


def test_a_squad_article_is_cut_at_a_sentence_end_and_keeps_the_questions_it_answers(tmp_path):
    document, questions = squad_article(squad_file(tmp_path), "dukes of n", 12, WordTokenizer())
    assert document == Document("Dukes of N", "Rollo came first. He was a duke.\n\nLater came William.")
    assert questions == [
        Question("Who came first?", ("Rollo",), "Rollo came first."),
        Question("What was he?", ("a duke", "duke"), "He was a duke."),
        Question("Who came later?", ("William",), "Later came William."),
    ]


def test_a_squad_article_within_the_budget_is_kept_whole_without_unanswerable_questions(tmp_path):
    document, questions = squad_article(squad_file(tmp_path), "Dukes_of_N", 14, WordTokenizer())
    assert document.text.endswith("William was a king.")
    assert [question.answers for question in questions] == [("Rollo",), ("a duke", "duke"), ("William",), ("a king",)]


def test_a_tokenizer_that_needs_more_tokens_for_a_prefix_still_gets_a_text_within_the_budget(tmp_path):
    class EndTokenizer(WordTokenizer):
        def encode(self, text):
            return [*super().encode(text), 0, 0, 0]

    document, _ = squad_article(squad_file(tmp_path), "Dukes_of_N", 12, EndTokenizer())
    assert document.text.endswith("He was a duke.")


def test_an_unknown_title_is_refused_with_the_titles_there_are(tmp_path):
    with pytest.raises(UserError, match="no document 'Kings'; it has: Dukes of N"):
        squad_article(squad_file(tmp_path), "Kings", 9)


def test_files_of_another_form_and_too_small_budgets_are_refused(tmp_path):
    for content in ("[]", '{"data": [{"paragraphs": []}]}', '{"data": [{"title": "T", "paragraphs": [{}]}]}'):
        with pytest.raises(UserError, match="is not SQuAD JSON"):
            read_corpus(write(tmp_path / "x.json", content))
    with pytest.raises(UserError, match="is not JSON"):
        read_corpus(write(tmp_path / "x.json", "title,text"))
    with pytest.raises(UserError, match="max_tokens=2 does not hold the first sentence"):
        squad_article(squad_file(tmp_path), "Dukes_of_N", 2, WordTokenizer())


def test_a_real_article_keeps_only_answers_that_its_text_holds():
    path = DATA / "squad_v2_dev_8_articles.json"
    if not path.exists():
        pytest.skip("squad_v2_dev_8_articles.json is not here; set CARTRIDGES_JAX_DATA to the folder that has it")
    whole, every = squad_article(path, "Normans", 10**6)
    cut, some = squad_article(path, "Normans", 600)
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


# Chunks


def test_chunks_have_lengths_in_bounds_and_stay_in_the_document():
    chunks = sample_chunks([1000], 400, min_tokens=50, max_tokens=90, seed=1)
    lengths = [chunk.num_tokens for chunk in chunks]
    assert len(chunks) == 400 and min(lengths) == 50 and max(lengths) == 90  # both bounds are drawn
    assert all(0 <= chunk.start and chunk.end <= 1000 for chunk in chunks)


def test_chunks_cover_a_document_evenly_where_uniform_starts_would_leave_holes():
    chunks = sample_chunks([10_000], 200, min_tokens=100, max_tokens=100, seed=3)
    assert token_coverage(chunks, [10_000]) == 1.0
    random_starts = np.random.default_rng(3).integers(0, 9901, size=200)
    assert token_coverage([Chunk(0, start, start + 100) for start in random_starts], [10_000]) < 0.95


def test_chunks_come_in_random_order_and_depend_on_the_seed_alone():
    chunks = sample_chunks([5000], 50, min_tokens=10, max_tokens=20, seed=7)
    assert chunks == sample_chunks([5000], 50, min_tokens=10, max_tokens=20, seed=7)
    assert chunks != sample_chunks([5000], 50, min_tokens=10, max_tokens=20, seed=8)
    starts = [chunk.start for chunk in chunks]
    assert starts != sorted(starts)


def test_chunks_stay_within_their_document_and_cover_documents_by_their_length(rng):
    sizes = [400, 3, 97, 1500]
    chunks = sample_chunks(sizes, 2000, min_tokens=20, max_tokens=60, seed=int(rng.integers(2**31)))
    counts = np.bincount([chunk.document for chunk in chunks], minlength=4)
    np.testing.assert_allclose(counts / 2000, np.array(sizes) / sum(sizes), atol=2 / 2000)
    assert all(0 <= chunk.start < chunk.end <= sizes[chunk.document] for chunk in chunks)
    assert {(chunk.start, chunk.end) for chunk in chunks if chunk.document == 1} == {(0, 3)}


def test_a_document_shorter_than_a_chunk_is_the_chunk():
    assert sample_chunks([30], 3, min_tokens=50, max_tokens=90, seed=0) == [Chunk(0, 0, 30)] * 3


@pytest.mark.parametrize(
    "bad", [{"document_tokens": [0]}, {"num_chunks": -1}, {"min_tokens": 0}, {"min_tokens": 9, "max_tokens": 8}]
)
def test_chunk_sizes_that_make_no_sense_are_refused_with_their_values(bad):
    sizes = {"document_tokens": [100], "num_chunks": 3, "min_tokens": 5, "max_tokens": 8, "seed": 0} | bad
    with pytest.raises(ValueError, match=re.escape(str(next(iter(bad.values()))))):
        sample_chunks(sizes.pop("document_tokens"), sizes.pop("num_chunks"), **sizes)


def test_token_coverage_counts_a_token_once():
    assert token_coverage([Chunk(0, 0, 5), Chunk(0, 3, 6)], [10]) == 0.6
    assert token_coverage([], [10]) == 0.0


def test_a_list_may_hold_patterns_folders_and_the_shipped_document(tmp_path):
    for name in ("a.md", "b.md", "c.txt"):
        write(tmp_path / name, f"Text of {name}.")
    listed = read_corpus(f"{tmp_path}/*.md,{tmp_path / 'c.txt'},quickstart")
    assert [document.name for document in listed] == ["a", "b", "c", "quickstart"]


def test_results_that_were_written_into_the_folder_are_not_read(tmp_path):
    write(tmp_path / "notes.txt", "Notes.")
    for directory, record in (("my.cartridge", "cartridge.json"), ("my.run", "run.json")):
        (tmp_path / directory / "train").mkdir(parents=True)
        write(tmp_path / directory / record, "{}")
        write(tmp_path / directory / "train" / "result.json", "{}")
    assert [document.name for document in read_corpus(tmp_path)] == ["notes"]


def test_equal_names_are_told_apart_and_selected_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "README.md", f"Text of {folder}.")
    corpus = read_corpus(["one/README.md", str(tmp_path / "two" / "README.md")])
    assert len({document.id for document in corpus}) == 2
    assert [document.text for document in corpus.select("readme")] == ["Text of one.", "Text of two."]
    assert [document.text for document in corpus.select(corpus.documents[1].id)] == ["Text of two."]


def test_articles_without_text_and_questions_without_words_are_left_out(tmp_path):
    squad = json.loads(squad_file(tmp_path).read_text())
    item = squad["data"][0]["paragraphs"][0]["qas"][0]
    blank = {**item, "question": " "}
    empty = {**item, "question": "Who?", "answers": [{"text": "", "answer_start": 0}]}
    squad["data"][0]["paragraphs"][0]["qas"] += [blank, empty]
    squad["data"].append({"title": "Nothing", "paragraphs": []})
    (document,) = read_corpus(write(tmp_path / "odd.json", json.dumps(squad)))
    assert len(document.questions) == 4 and all(question.answers[0] for question in document.questions)
