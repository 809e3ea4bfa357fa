"""Readers, questions and SQuAD files."""

import dataclasses
import json
import os
import re
import threading
from pathlib import Path

import pytest

from cartridges_jax.corpus import Corpus, Document, read_corpus, readers, tokenize_corpus
from cartridges_jax.corpus.questions import Question, questions_hash, read_questions
from cartridges_jax.errors import UserError

DATA = Path(os.environ.get("CARTRIDGES_JAX_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


class WordTokenizer:
    """A token is a run of visible characters; ids are hashes that no test reads."""

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


def test_articles_without_text_and_questions_without_words_are_left_out(tmp_path):
    squad = json.loads(squad_file(tmp_path).read_text())
    item = squad["data"][0]["paragraphs"][0]["qas"][0]
    blank = {**item, "question": " "}
    empty = {**item, "question": "Who?", "answers": [{"text": "", "answer_start": 0}]}
    squad["data"][0]["paragraphs"][0]["qas"] += [blank, empty]
    squad["data"].append({"title": "Nothing", "paragraphs": []})
    (document,) = read_corpus(write(tmp_path / "odd.json", json.dumps(squad)))
    assert len(document.questions) == 4 and all(question.answers[0] for question in document.questions)
