"""The report: the results of the finished stages in one place."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from cartridges_jax.checkpoint import Cartridge
from cartridges_jax.corpus.chunks import Chunk, token_coverage
from cartridges_jax.corpus.questions import questions_hash
from cartridges_jax.data.schema import Conversation
from cartridges_jax.evaluation.report import complete_report, write_report
from cartridges_jax.evaluation.summary import format_summary
from cartridges_jax.files import write_atomically
from cartridges_jax.pipeline.inputs import replaced_questions
from cartridges_jax.pipeline.stages.context import RunContext
from cartridges_jax.pipeline.stages.evaluate import ANSWERS, asked_questions
from cartridges_jax.pipeline.workdir import Stage


def report(
    run: RunContext,
    study_stage: Stage,
    train_stage: Stage,
    evaluate_stage: Stage,
    conversations: list[Conversation],
    cartridge: Cartridge,
) -> dict[str, Any]:
    """Writes `report.json`, `report.html` and `answers.parquet` into the workdir, and reports the summary."""
    config, corpus = run.config, run.corpus
    studied, trained, measured = study_stage.result(), train_stage.result(), evaluate_stage.result()
    seconds = {
        "synthesis": study_stage.spent(),
        "training": train_stage.spent(),
        "evaluation": evaluate_stage.spent(),
    }
    judge = "the model with the whole document in context"
    if measured["tokens_cut"]:
        judge += f" (its last {measured['tokens_cut']} tokens did not fit and were cut)"
    content = {
        "model": run.model.name,
        "model_fingerprint": run.model.fingerprint,
        "seed": config.seed,
        "corpus": {
            "name": corpus.name,
            "tokens": corpus.num_tokens,
            "sha256": corpus.sha256,
            "documents": [
                {"name": part.document.name, "tokens": part.num_tokens, "sha256": part.document.sha256}
                for part in corpus.documents
            ],
        },
        "cartridge": {
            "tokens": cartridge.prefix.num_slots,
            "bytes": cartridge.prefix.nbytes,
            "frozen": cartridge.metadata.num_frozen,
        },
        "conditions": measured["conditions"],
        "condition_list": measured["condition_list"],
        "metric_list": measured["metric_list"],
        **measured["headline"],
        "reasons": measured["reasons"],
        "dropped_training_questions": trained["dropped_training_questions"],
        "dropped_heldout_conversations": trained["dropped_heldout_conversations"],
        "seconds": {**seconds, "total": sum(seconds.values())},
        "conversations": trained["trained_on"],
        "heldout_conversations": trained["heldout"],
        "study": {
            "asked": studied["wanted"],
            "conversations": studied["conversations"],
            "written": studied["written"],
            "dropped": studied["dropped"],
        },
        "steps": trained["steps"],
        "refused_steps": trained["refused_steps"],
        "packing_efficiency": trained["packing_efficiency"],
        "epochs": trained["epochs"],
        "questions": len(asked_questions(run)),
        "questions_sha256": questions_hash(run.questions),
        "replaced_questions": replaced_questions(run.workdir),
        "examples": measured["examples"],
        "judge": judge,
        "trained_by": f"the model with the {config.study.teacher_context} in context",
        "coverage": _coverage(run, conversations),
        "history": trained["history"],
        "answers": measured["answers"],
        "answers_file": ANSWERS,
        "config": dataclasses.asdict(config),
    }
    write_atomically(run.workdir.path / ANSWERS, (evaluate_stage.directory / ANSWERS).read_bytes())
    # The same as a reader of the file gets.
    content = complete_report(content)
    _, page = write_report(run.workdir.path, content)
    run.reporter.say(format_summary(content, page))
    run.reporter.say(f"Cartridge: {run.workdir.path / 'cartridge'}")
    return content


def _coverage(run: RunContext, conversations: list[Conversation]) -> dict[str, Any]:
    counts = np.zeros(len(run.corpus.sentences), int)
    for conversation in conversations:
        counts[conversation.metadata["sentence_index"]] += 1
    ids = {document.document.id: number for number, document in enumerate(run.corpus.documents)}
    # A single document is found by its text: its file may have been renamed since the study.
    alone = len(ids) == 1
    chunks = {
        (0 if alone else ids[conversation.metadata["document"]], *conversation.metadata["chunk_span"])
        for conversation in conversations
    }
    return {
        "sentences": len(counts),
        "asked": int((counts > 0).sum()),
        "conversations_per_sentence": counts.tolist(),
        "tokens": token_coverage(
            [Chunk(*span) for span in sorted(chunks)], [document.num_tokens for document in run.corpus.documents]
        ),
    }
