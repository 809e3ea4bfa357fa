"""The five seams: a member of each, defined here in at most 40 lines, and one run that uses all five by name."""

from __future__ import annotations

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_runs import config_of, settings, talker_gguf  # noqa: F401

from cartridges_jax import sampling
from cartridges_jax.checkpoint import load_cartridge
from cartridges_jax.corpus import Document, read_corpus, readers, tokenize_corpus
from cartridges_jax.data.conversations import TopLogprobs, read_shard
from cartridges_jax.distill import learner as learners
from cartridges_jax.evaluation import tasks
from cartridges_jax.evaluation.tasks import Example, Metric
from cartridges_jax.models import load_model
from cartridges_jax.pipeline.run import run
from cartridges_jax.prefixes import registry as prefixes
from cartridges_jax.selfstudy import teacher as teachers


def read_log(path, data):
    """One document per line of a log: its first word is the name."""
    lines = [line.split(maxsplit=1) for line in data.decode().splitlines() if line.strip()]
    return [Document(name, text, source=str(path)) for name, text in lines]


def last_tokens(model, corpus, num_slots, rng, *, room=0):
    """The last tokens of the corpus instead of the first."""
    ids = np.concatenate([document.token_ids for document in corpus.documents])
    return sampling.prefill(model, ids[-num_slots:].tolist())


class Parrot:
    """Writes a question made of the prompt's words, and answers with the first words of the context."""

    def __init__(self, model, argument, heartbeat):
        self.name, self._model, self._asked = "parrot", model, 0

    def reply(self, context, conversations, *, max_tokens, temperature, top_logprobs=0, seed=0):
        return [self._one(context, top_logprobs) for _ in conversations]

    def _one(self, context, k):
        self._asked += 1
        text = f"s {self._asked} and t?" if not k else " ".join(context.split()[:3])
        ids = [*self._model.tokenizer.encode(text), self._model.chat.end_of_turn_id]
        places = np.asarray(ids)[:, None] + np.arange(max(k, 1))
        logprobs = np.log(np.where(np.arange(max(k, 1)) == 0, 0.9, 0.01) * np.ones(places.shape))
        return teachers.Reply(text, ids, TopLogprobs.from_dense(places, logprobs) if k else None, "stop")


class Lengths:
    """How many words an answer has."""

    name = "lengths"
    metrics = (Metric("words", "Words", higher_is_better=False, format=".1f"),)

    def __init__(self, inputs):
        names = [document.document.name for document in inputs.corpus.documents]
        self.examples = tuple(Example(n, ({"role": "user", "content": f"What about {n}?"},), ("t",)) for n in names)

    def score(self, example, answer):
        return {"words": float(len(answer.split()))}


@dataclasses.dataclass(frozen=True)
class ValuesOnly:
    """Trains the values of all slots; the keys stay."""

    num_frozen: int = 0

    def init(self, model, prefix):
        return prefix, {"values": prefix.values.astype(jnp.float32)}

    def combine(self, params, frozen, trainable):
        return params, frozen.replace(keys=frozen.keys.astype(jnp.float32), values=trainable["values"])

    def mask(self, frozen, trainable):
        return jnp.ones(())

    def axes(self, trainable):
        return {"values": ("layers", "kv_heads", "slots", None)}

    def export(self, frozen, trainable):
        return jax.tree.map(jnp.asarray, self.combine(None, frozen, trainable)[1])


MEMBERS = (read_log, last_tokens, Parrot, Lengths, ValuesOnly)


@pytest.fixture
def registered():
    """The five members under their names, until the test ends."""
    registries = (
        readers.READERS, prefixes.PREFIXES, teachers.TEACHERS, tasks.TASKS, learners.LEARNERS
    )  # fmt: skip
    before = [dict(registry) for registry in registries]
    readers.register(".log")(read_log)
    prefixes.register("last_tokens", title="The last tokens")(last_tokens)
    teachers.register("parrot")(Parrot)
    tasks.register("lengths")(Lengths)
    learners.register("values_only")(ValuesOnly)
    yield
    for registry, members in zip(registries, before):
        registry.clear()
        registry.update(members)


def test_one_run_uses_a_reader_an_initialiser_a_teacher_a_task_and_a_learner_of_ones_own(
    registered, talker_gguf, tmp_path
):
    shed = "The shed has t and s, and w and c and b. It has f and o. A shed is s. " * 3
    (tmp_path / "notes.log").write_text(f"shed {shed}\nboat {shed.replace('shed', 'boat')}\n")
    config = config_of(
        settings(
            talker_gguf,
            tmp_path,
            corpus=str(tmp_path / "notes.log"),
            questions="",
            cartridge__init="last_tokens",
            study__teacher="parrot",
            study__writer="chat",
            study__filters=(),
            study__conversations=8,
            heldout=2,
            train__learner="values_only",
            train__steps=6,
            evaluation__tasks=("lengths",),
            evaluation__conditions=("none", "last_tokens", "whole_text", "cartridge"),
        )  # fmt: skip
    )
    report = run(config, tmp_path / "run")
    assert [document["name"] for document in report["corpus"]["documents"]] == ["shed", "boat"]
    conversations = [c for path in sorted((tmp_path / "run").rglob("shard-*.parquet")) for c in read_shard(path)]
    assert {c.metadata["teacher"] for c in conversations} == {"parrot"}
    assert {m["name"] for m in report["metric_list"]} >= {"words", "teacher_kl"}
    assert set(report["conditions"]) == {"none", "last_tokens", "whole_text", "cartridge"}
    rows = pq.read_table(tmp_path / "run" / report["answers_file"]).to_pylist()
    for name, values in report["conditions"].items():
        own = [len(row["answer"].split()) for row in rows if row["condition"] == name]
        assert len(own) == 2 and values["words"] == pytest.approx(sum(own) / 2)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Words" in page and "The last tokens" in page
    # The learner left the initialiser's keys as they were, and moved the values.
    trained = load_cartridge(tmp_path / "run" / "cartridge").prefix
    model = load_model(str(talker_gguf))
    start = last_tokens(model, tokenize_corpus(read_corpus(tmp_path / "notes.log"), model.tokenizer), 24, None)
    np.testing.assert_array_equal(trained.keys, start.keys)
    assert np.abs(np.asarray(trained.values) - np.asarray(start.values)).max() > 1e-3
    assert json.loads((tmp_path / "run" / "report.json").read_text())["config"]["train"]["learner"] == "values_only"


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_a_member_takes_at_most_forty_lines(member):
    assert len(inspect.getsource(member).splitlines()) <= 40
