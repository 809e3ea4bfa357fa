"""The report is complete, strict JSON, self-contained HTML, and safe whatever the texts in it."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cartridges_jax.evaluation import figures, svg
from cartridges_jax.evaluation.report import complete_report, write_report
from cartridges_jax.evaluation.summary import format_summary
from cartridges_jax.evaluation.units import format_bytes, format_percent, format_ratio, format_seconds, format_value

VOID = {"meta", "link", "br", "path", "use", "rect"}


def metric(name, title, format=".3f", *, featured=False, higher=False, unit="", mark="", note=""):
    return {
        "name": name, "title": title, "format": format, "featured": featured, "higher_is_better": higher, "unit": unit,
        "mark": mark, "note": note, "aggregate": "mean",
    }  # fmt: skip


METRICS = [
    metric("teacher_kl", "KL to whole text", featured=True, unit="nats per token"),
    metric("heldout_kl", "KL, held-out"),
    metric("answer_nll", "Answer NLL", featured=True, unit="nats per token"),
    metric("own_nll", "Own-answer NLL"),
    metric("facts", "Facts", "count", featured=True, higher=True, mark="contains a reference answer"),
    metric("f1", "F1", ".2f", higher=True),
    metric("exact_match", "Exact match", ".2f", higher=True),
    metric("kl_closed", "KL gap closed", "percent", higher=True),
    metric("gap_closed", "NLL gap closed", "percent", higher=True),
    metric("prefix_tokens", "Slots", "count"),
    metric("kv_bytes", "KV memory", "bytes"),
]
CONDITIONS = [
    {"name": "none", "title": "No document", "role": "baseline"},
    {"name": "first_tokens", "title": "First tokens", "role": ""},
    {"name": "cartridge", "title": "Cartridge", "role": "subject"},
    {"name": "whole_text", "title": "Whole text", "role": "judge"},
]


def fake_report() -> dict:
    """A fresh, complete report as a small run makes it, with invented numbers."""

    def condition(answer_nll, teacher_kl, heldout_kl, own_nll, facts, f1, exact_match, prefix_tokens):
        return {
            "answer_nll": answer_nll, "teacher_kl": teacher_kl, "heldout_kl": heldout_kl, "own_nll": own_nll,
            "facts": facts, "f1": f1, "exact_match": exact_match, "kl_closed": 1 - teacher_kl / 1.441,
            "gap_closed": (2.508 - answer_nll) / (2.508 - 0.714), "prefix_tokens": prefix_tokens,
            "kv_bytes": prefix_tokens * 2 * 30 * 3 * 64 * 4,
        }  # fmt: skip

    answers = [
        ("Who keeps the lost property?", ["Maren", "Maren Holt"], "The hotel keeps it.", "The lost property is kept by the warden of the hostel.", "Lost property is kept by Maren Holt.", "Maren Holt keeps lost property in the blue cupboard."),
        ("At what time does the kitchen close?", ["half past nine", "21:30"], "The kitchen closes at 10:00 pm every day, but check with the staff.", "At 10 pm.", "The kitchen closes at ten.", "The kitchen closes at half past nine."),
        ("How many beds are there?", ["42"], "There are 12 beds.", "42 beds.", "There are 42 beds in nine rooms.", "42"),
    ]  # fmt: skip
    right = [(0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 1, 1)]
    names = [entry["name"] for entry in CONDITIONS]
    return {
        "model": "SmolLM2-135M-Instruct",
        "model_fingerprint": "9f31c0de77ab",
        "seed": 0,
        "corpus": {
            "name": "Fjordside Hostel handbook",
            "tokens": 811,
            "sha256": "5e" * 32,
            "documents": [{"name": "Fjordside Hostel handbook", "tokens": 811, "sha256": "5e" * 32}],
        },
        "cartridge": {"tokens": 128, "bytes": 128 * 2 * 30 * 3 * 64 * 4, "frozen": 1},
        "conditions": {
            "none": condition(2.508, 1.441, 1.37, 3.02, 1, 0.08, 0.0, 0) | {"f1": None, "exact_match": None},
            "first_tokens": condition(1.870, 0.757, 0.70, 1.90, 4, 0.22, 0.06, 128),
            "cartridge": condition(1.327, 0.387, 0.33, 1.21, 9, 0.48, 0.25, 128),
            "whole_text": condition(0.714, 0.0, 0.0, 0.61, 13, 0.71, 0.56, 811),
        },
        "condition_list": copy.deepcopy(CONDITIONS),
        "metric_list": copy.deepcopy(METRICS),
        "reasons": {
            "conditions.none.f1": "without the document no answers were written",
            "conditions.none.exact_match": "without the document no answers were written",
        },
        "kl_closed": 1 - 0.387 / 1.441,
        "gap_closed": (2.508 - 1.327) / (2.508 - 0.714),
        "facts": 9,
        "dropped_training_questions": 9,
        "dropped_heldout_conversations": 2,
        "seconds": {"synthesis": 131.2, "training": 402.7, "evaluation": 48.1, "total": 584.0},
        "conversations": 380,
        "heldout_conversations": 20,
        "study": {
            "asked": 420,
            "conversations": 400,
            "dropped": {"question": {"no question mark": 14, "too long": 3}, "creative": {"repeats itself": 8}},
        },
        "steps": 160,
        "refused_steps": 1,
        "questions": 16,
        "questions_sha256": "c4" * 32,
        "replaced_questions": [],
        "examples": {"questions": 16, "heldout": 20},
        "judge": "the model with the whole document in context",
        "trained_by": "the model with a chunk of 160 to 320 tokens in context",
        "coverage": {
            "sentences": 48,
            "asked": 44,
            "conversations_per_sentence": [0 if i in (7, 8, 23, 40) else 2 + (i * 7) % 11 + i % 3 for i in range(48)],
            "tokens": 0.994,
        },
        "history": {
            "train": [
                {
                    "step": step,
                    "loss": 0.36 + 0.9 * math.exp(-step / 30) + 0.09 * math.sin(step * 2.3) * math.cos(step * 0.7),
                }
                for step in range(160)
            ],
            "heldout": [{"step": step, "loss": 0.42 + 0.78 * math.exp(-step / 34)} for step in range(0, 161, 20)],
        },
        "answers": [
            {
                "task": "questions",
                "id": f"{number:012}",
                "question": question,
                "references": references,
                "answers": dict(zip(names, texts)),
                "scores": {name: {"facts": float(hit)} for name, hit in zip(names, hits)},
            }
            for number, ((question, references, *texts), hits) in enumerate(zip(answers * 4, right * 4))
        ],
        "answers_file": "answers.parquet",
        "config": {
            "cartridge": {"slots": 128, "frozen": 1},
            "train": {"learning_rate": 0.02, "steps": 160, "pack": [8, 128]},
        },
    }


class Balanced(HTMLParser):
    """Checks that tags nest."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def write_and_read(tmp_path, report) -> tuple[dict, str]:
    json_path, html_path = write_report(tmp_path, report)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json_path.read_text("utf-8"), parse_constant=refuse), html_path.read_text("utf-8")


def test_what_is_written_is_what_was_measured(tmp_path):
    written, page = write_and_read(tmp_path, fake_report())
    assert written == fake_report()
    for shown in (
        "Fjordside Hostel handbook",
        "73 %",
        "47 %",
        "66 %",
        "9 of 16",
        "6.3×",
        "128",
        "811",
        "0.387",
        "1.327",
        "9 min 44 s",
    ):
        assert shown in page, shown


def test_the_page_is_well_formed_and_asks_the_network_for_nothing(tmp_path):
    _, page = write_and_read(tmp_path, fake_report())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"""<script|@import|(?:src|href)=["'](?!#|data:)|url\((?!#)""", page)


def test_the_page_prints_the_rules_of_measurement(tmp_path):
    _, page = write_and_read(tmp_path, fake_report())
    for rule in ("frozen before self-study", "c4c4c4", "9 training questions", "live slots", "Time includes self-study",
                 "the model with the whole document in context", "a chunk of 160 to 320 tokens", "answers freely"):  # fmt: skip
        assert rule in page, rule


def test_texts_of_a_model_cannot_break_the_page(tmp_path):
    report = fake_report()
    report["corpus"]["name"] = "<b>A & B</b>"
    report["answers"][0]["answers"]["cartridge"] = "<script>alert(1)</script>"
    report["condition_list"][1]["title"] = "<script>first</script>"
    report["config"]["note"] = "</pre><script>"
    _, page = write_and_read(tmp_path, report)
    assert "<script" not in page and "&lt;b&gt;A &amp; B&lt;/b&gt;" in page


def test_numbers_that_are_not_finite_become_null_with_a_reason(tmp_path):
    report = fake_report()
    report["conditions"]["whole_text"]["own_nll"] = math.inf
    report["history"]["train"][3]["loss"] = float("nan")
    written, page = write_and_read(tmp_path, report)
    assert written["conditions"]["whole_text"]["own_nll"] is None and written["history"]["train"][3]["loss"] is None
    assert written["reasons"]["conditions.whole_text.own_nll"] == "the value was not finite (inf)"
    assert written["reasons"]["history.train.3.loss"] == "the value was not finite (nan)"
    assert "the value was not finite (inf)" in page


def test_an_undefined_number_always_has_a_reason_beside_it():
    report = fake_report() | {"reasons": {}, "kl_closed": None}
    reasons = complete_report(report)["reasons"]
    assert set(reasons) == {"conditions.none.f1", "conditions.none.exact_match", "kl_closed"}


def test_numpy_values_paths_and_tuples_are_written_as_plain_json(tmp_path):
    report = fake_report()
    report["kl_closed"] = np.float32(0.5)
    report["coverage"]["conversations_per_sentence"] = np.arange(48)
    report["config"] = {"workdir": tmp_path, "shape": (1, np.int64(2))}
    written, _ = write_and_read(tmp_path, report)
    assert written["kl_closed"] == 0.5 and written["config"] == {"workdir": str(tmp_path), "shape": [1, 2]}


def test_missing_keys_are_all_named(tmp_path):
    report = fake_report()
    del report["judge"], report["conditions"]["whole_text"]["f1"], report["seconds"]
    del report["answers"][1]["answers"]["whole_text"], report["metric_list"][2]["title"]
    missing = "lacks seconds, judge, metric_list.2.title, conditions.whole_text.f1, answers.1.answers.whole_text;"
    with pytest.raises(ValueError, match=re.escape(missing)):
        write_report(tmp_path, report)
    assert list(tmp_path.iterdir()) == []


def test_what_json_cannot_hold_is_refused_by_name(tmp_path):
    report = fake_report()
    report["config"]["when"] = {1, 2}
    with pytest.raises(TypeError, match=r"config\.when is a set"):
        write_report(tmp_path, report)


def test_writing_leaves_no_temporary_files_and_replaces_an_old_report(tmp_path):
    write_report(tmp_path, fake_report() | {"seed": 1})
    written, _ = write_and_read(tmp_path, fake_report() | {"seed": 2})
    assert written["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_report_of_a_run_that_measured_nearly_nothing_can_still_be_written(tmp_path):
    report = fake_report()
    report["conditions"] = {name: dict.fromkeys(values) for name, values in report["conditions"].items()}
    report |= {"kl_closed": None, "gap_closed": None, "facts": None, "answers": [], "replaced_questions": ["ab" * 32]}
    report["study"] = {"asked": 0, "conversations": 0, "dropped": {}}
    report["history"] = {"train": [], "heldout": []}
    report["coverage"] = {"sentences": 0, "asked": 0, "conversations_per_sentence": [], "tokens": None}
    report["reasons"] = {"kl_closed": "evaluation was skipped"}
    _, page = write_and_read(tmp_path, report)
    assert "Undefined: evaluation was skipped" in page and "No answers were recorded" in page
    assert "evaluation was skipped" in format_summary(report)


def test_a_cartridge_that_is_worse_than_nothing_is_said_to_be(tmp_path):
    _, page = write_and_read(tmp_path, fake_report() | {"kl_closed": -0.12})
    assert "−12 %" in page and "worse than nothing" in page


def test_the_summary_shows_conditions_answers_and_where_the_page_is(capsys):
    summary = format_summary(fake_report(), "run/report.html")
    assert capsys.readouterr().out == ""
    titles = tuple(condition["title"] for condition in CONDITIONS)
    rows = [line for line in summary.splitlines() if line.startswith(titles)]
    assert [re.split(r"\s{2,}", row)[1] for row in rows] == ["1.441", "0.757", "0.387", "0.000"]
    assert [re.split(r"\s{2,}", row)[3] for row in rows] == ["1", "4", "9", "13"]
    said = summary.replace("\n", " ")
    assert "closes 73 % of the gap to the whole text (First tokens: 47 %), with 6.3× less KV memory." in said
    assert "9 of its 16 answers hold the fact" in said and "Who keeps the lost property?" in summary
    assert summary.endswith("Report: run/report.html")


# Conditions and metrics that the report does not know


def test_a_made_up_condition_and_metric_show_up_in_table_figure_page_and_summary(tmp_path):
    report = fake_report()
    report["condition_list"].insert(2, {"name": "summary:64.5", "title": "Summary of 64", "role": ""})
    report["conditions"]["summary:64.5"] = report["conditions"]["first_tokens"] | {"f1": None, "kl_closed": 0.123}
    report["metric_list"].insert(0, metric("shouts", "Shouting", ".1f", featured=True, higher=True, mark="shouts"))
    for number, values in enumerate(report["conditions"].values()):
        values["shouts"] = 10.5 + number
    for item in report["answers"]:
        item["answers"]["summary:64.5"] = "IN CAPITALS"
        item["scores"]["summary:64.5"] = {"shouts": 1.0}
    written, page = write_and_read(tmp_path, report)
    assert written["reasons"]["conditions.summary:64.5.f1"] == "no reason was recorded"
    wide, table = page[: page.index("All numbers")], page[page.index("All numbers") :]
    assert re.search(r"<text[^>]*>Shouting ↑</text>", wide) and "Shouting ↑</th>" in table
    assert len(re.findall(r"<text[^>]*>Summary of 64</text>", wide)) >= 2 * 4  # four panels in two widths
    assert "<th>Summary of 64</th>" in table and "<td>14.5</td>" in table
    assert "Summary of 64: 12 %" in page and "IN CAPITALS" in page and 'title="shouts">✓' in page
    summary = format_summary(report)
    assert "Shouting" in summary and "IN CAPITALS" in summary and max(map(len, summary.splitlines())) <= 100


@pytest.mark.parametrize("left_out", ["first_tokens", "none", "cartridge"])
def test_a_report_without_one_of_the_usual_conditions_is_complete(tmp_path, left_out):
    report = fake_report()
    report["condition_list"] = [entry for entry in report["condition_list"] if entry["name"] != left_out]
    title = next(entry["title"] for entry in CONDITIONS if entry["name"] == left_out)
    del report["conditions"][left_out]
    for item in report["answers"]:
        del item["answers"][left_out], item["scores"][left_out]
    _, page = write_and_read(tmp_path, report)
    assert f"<th>{title}</th>" not in page and "<th>Whole text</th>" in page
    assert title not in re.findall(r"^\S+(?: \S+)?", format_summary(report), re.MULTILINE)


def test_metrics_that_do_not_fit_into_a_hundred_columns_are_left_out_of_the_summary():
    report = fake_report()
    for number in range(12):
        report["metric_list"].insert(0, metric(f"m{number}", f"Measure {number}", featured=True))
        for values in report["conditions"].values():
            values[f"m{number}"] = 0.5
    lines = format_summary(report).splitlines()
    assert max(map(len, lines)) <= 100 and "Measure 11" in lines[0] and "Measure 0" not in lines[0]


# Honesty about the data


def test_drops_are_listed_by_family_and_reason(tmp_path):
    _, page = write_and_read(tmp_path, fake_report())
    assert "<th>no question mark</th><th>too long</th><th>repeats itself</th>" in page
    assert "<th>question</th><td>14</td><td>3</td><td>0</td><td>17</td>" in page
    assert "420 were asked for" in page and "2 more were dropped" in page


def test_several_documents_are_listed_and_a_single_one_is_not(tmp_path):
    report = fake_report()
    _, page = write_and_read(tmp_path, report)
    assert "<th>Document</th>" not in page
    report["corpus"]["documents"].append({"name": "House rules", "tokens": 1234, "sha256": "ab" * 32})
    _, page = write_and_read(tmp_path, report)
    assert "2 documents" in page and "<th>House rules</th><td>1,234</td><td><code>abababababab</code></td>" in page


def test_a_new_evaluation_says_that_it_is_one(tmp_path):
    _, page = write_and_read(tmp_path, fake_report())
    assert "New evaluation" not in page
    _, page = write_and_read(tmp_path, fake_report() | {"replaced_questions": ["d7" * 32]})
    assert "New evaluation" in page and "d7" * 8 in page


def test_figures_are_deterministic_follow_the_pages_colours_and_keep_text_as_text():
    report = fake_report()
    history = report["history"]
    pictures = [figures.loss_figure(history["train"], history["heldout"], figures.WIDE) for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert "held out</text>" in pictures[0] and "var(--cartridge" in pictures[0]
    leftovers = set(re.findall(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", pictures[0])))
    assert not leftovers & set(svg._CSS)


def test_ids_of_the_figures_on_one_page_do_not_collide(tmp_path):
    _, page = write_and_read(tmp_path, fake_report())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert ids and len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (format_bytes(0), "0 B"), (format_bytes(1023), "1023 B"), (format_bytes(2048), "2.0 KiB"),
        (format_bytes(3 * 2**30), "3.0 GiB"), (format_bytes(None), "—"),
        (format_seconds(48.12), "48.1 s"), (format_seconds(95.2), "1 min 35 s"), (format_seconds(7260), "2 h 01 min"),
        (format_percent(0.704), "70 %"), (format_percent(-0.12), "−12 %"), (format_percent(None), "—"),
        (format_value({"format": "count"}, 1234.0), "1,234"), (format_value({"format": ".2f"}, 0.123), "0.12"),
        (format_value({"format": "bytes"}, 2048), "2.0 KiB"), (format_value({"format": "percent"}, None), "—"),
        (format_ratio(6.31), "6.3× less"), (format_ratio(0.5), "2.0× more"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(written, expected):
    assert written == expected


def test_bars_have_the_colour_of_their_condition_role():
    panels = [(METRICS[0], [1.0, 0.5, None, 0.0])]
    picture = figures.conditions_figure(CONDITIONS, panels, figures.WIDE)
    assert "var(--document" in picture and "var(--plain" in picture and "undefined</text>" in picture
