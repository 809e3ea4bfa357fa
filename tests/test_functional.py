"""A text to a cartridge from Python, without a workdir, silently, and in any thread. The model is the tiny talker."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import tempfile

import numpy as np
import pytest
from tiny_runs import DOCUMENT, SMALL, talker_gguf  # noqa: F401

import cartridges_jax as cj
from cartridges_jax.pipeline.distillation import split
from cartridges_jax.selfstudy.settings import SynthesisSettings

STUDY = {
    name.removeprefix("study."): value
    for name, value in SMALL.items()
    if name.startswith("study.") and not name.startswith("study.families")
}
TRAIN = {name.removeprefix("train."): value for name, value in SMALL.items() if name.startswith("train.")}


@pytest.fixture(scope="module")
def made(talker_gguf, tmp_path_factory):
    """(model, corpus, study, cartridge) made by a thread that is not the main one."""
    place = tmp_path_factory.mktemp("text")
    (place / "doc.md").write_text(DOCUMENT)
    model = cj.load_model(str(talker_gguf))
    corpus = cj.read_corpus(place / "doc.md")
    families = {name: float(name == "generic") for name in SynthesisSettings().families}

    def work():
        study = cj.self_study(model, corpus, families=families, seed=1, **STUDY)
        return study, cj.train(model, corpus, study, num_slots=24, heldout=3, **TRAIN)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return model, corpus, *thread.submit(work).result()


def test_a_thread_makes_a_cartridge_that_is_saved_loaded_and_answers(made, tmp_path, capfd):
    model, corpus, study, cartridge = made
    assert len(study.conversations) == SMALL["study.conversations"]
    cj.save_cartridge(cartridge, tmp_path / "my.cartridge")
    loaded = cj.load_cartridge(tmp_path / "my.cartridge")
    np.testing.assert_array_equal(loaded.prefix.keys, cartridge.prefix.keys)
    assert loaded.metadata == cartridge.metadata and loaded.metadata.documents[0].name == "doc"
    answer = cj.generate(model, "What has shed 4?", prefix=loaded, max_tokens=5)
    assert isinstance(answer, str)
    assert "".join(cj.stream(model, "What has shed 4?", prefix=loaded, max_tokens=5)) == answer
    both = cj.compose(cartridge, loaded)
    assert both.num_slots == 48 and int(both.next_position) == 48
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_an_evaluation_uses_the_conversations_that_training_held_out(made):
    model, corpus, study, cartridge = made
    found = cj.evaluate(
        model, corpus, cartridge, questions=[cj.Question("What has shed 4?", ("t and s",))], study=study, heldout=3
    )
    assert set(found.conditions) == {"none", "first_tokens", "whole_text", "cartridge"}
    assert found.conditions["whole_text"]["teacher_kl"] == pytest.approx(0, abs=1e-5)
    seen = {row["question"] for row in found.rows if row["task"] == "heldout"}
    kept_out = split(study.conversations, [cj.Question("What has shed 4?", ("t and s",))], 3, 0).heldout
    assert kept_out and seen == {study.conversations[i].messages[0].content for i in kept_out}
    with pytest.raises(cj.UserError, match="nothing to evaluate on"):
        cj.evaluate(model, corpus, cartridge)


def test_a_study_without_a_directory_leaves_no_files(made):
    model, corpus, *_ = made
    families = {name: float(name == "generic") for name in SynthesisSettings().families}
    study = cj.self_study(model, corpus, families=families, seed=2, **STUDY | {"conversations": 4})
    (shard,) = {c.messages[1].top_logprobs.path.parent for c in study.conversations}
    assert shard.is_dir() and str(shard).startswith(tempfile.gettempdir())
    del study
    gc.collect()
    assert not os.path.exists(shard)
