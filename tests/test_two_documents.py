"""Two documents in one corpus: one cartridge, from self-study to the report. The model is the tiny talker."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_runs import DOCUMENT, QUESTIONS, Collected, config_of, settings, talker_gguf  # noqa: F401

from cartridges_jax import sampling
from cartridges_jax.checkpoint import load_cartridge
from cartridges_jax.data.conversations import read_shard
from cartridges_jax.pipeline.run import run
from cartridges_jax.prefixes import PREFIXES, register

SHEDS, BOATS = DOCUMENT.split("\n\n## The boats\n\n")
BOATS = "# The boats\n\n" + BOATS * 2


@pytest.fixture(scope="module")
def made(talker_gguf, tmp_path_factory):
    """(directory, what was said, report) of a run over two files, whose initial prefix the test registers."""
    directory = tmp_path_factory.mktemp("two")
    (directory / "sheds.md").write_text(SHEDS)
    (directory / "boats.md").write_text(BOATS)
    (directory / "questions.jsonl").write_text(QUESTIONS)

    # From both documents, and smaller than the cartridge may be.
    @register("both_beginnings", title="The beginnings of both documents")
    def make(model, corpus, num_slots, rng, *, room=0):
        tokens = [token for document in corpus.documents for token in document.token_ids[:9].tolist()]
        return sampling.prefill(model, tokens)

    said = []
    files = f"{directory / 'sheds.md'},{directory / 'boats.md'}"
    config = config_of(settings(talker_gguf, directory, corpus=files, cartridge__init="both_beginnings"))
    try:
        report = run(config, directory / "run", reporter=Collected(said))
    finally:
        del PREFIXES["both_beginnings"]
    return directory / "run", said, report


def test_self_study_reads_both_documents(made):
    shards = sorted((made[0] / "study").glob("*/shard-*.parquet"))
    studied = {conversation.metadata["document"] for shard in shards for conversation in read_shard(shard)}
    assert studied == {"sheds", "boats"}


def test_the_report_lists_both_documents_with_their_tokens_and_hashes(made):
    corpus = json.loads((made[0] / "report.json").read_text())["corpus"]
    assert [document["name"] for document in corpus["documents"]] == ["sheds", "boats"]
    assert corpus["tokens"] == sum(document["tokens"] for document in corpus["documents"])
    assert len({document["sha256"] for document in corpus["documents"]} | {corpus["sha256"]}) == 3
    page = (made[0] / "report.html").read_text()
    assert all(
        f"Document {document['name']}" in page and document["sha256"] in page for document in corpus["documents"]
    )


def test_every_condition_is_measured_on_the_questions_of_both(made):
    report = made[2]
    assert len(report["answers"]) == 2
    assert all(np.isfinite(measures["answer_nll"]) for measures in report["conditions"].values())
    assert report["coverage"]["sentences"] == len(report["coverage"]["conversations_per_sentence"])


def test_one_cartridge_is_trained_from_the_initial_prefix_that_the_config_names(made):
    workdir, said, report = made
    cartridge = load_cartridge(workdir / "cartridge")
    assert cartridge.prefix.num_slots == report["cartridge"]["tokens"] == 18
    assert "cartridge.init='both_beginnings' fills 18 of 24 slots" in said
    assert cartridge.metadata.num_frozen == 1
    losses = [step["loss"] for step in report["history"]["heldout"]]
    assert losses[-1] < losses[0]
