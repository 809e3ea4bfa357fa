"""The benchmarks run from end to end on tiny models, and both sides of a comparison do the same work.

Nothing here asserts a speed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_prefix, random_tokens, tiny_config
from tiny_runs import DOCUMENT, ROOT, environment, talker_gguf  # noqa: F401

from cartridges_jax import sampling
from cartridges_jax.benchmarks import inputs, memory, peers, train_step
from cartridges_jax.benchmarks.run import BENCHMARKS, run
from cartridges_jax.benchmarks.timing import Times, interleaved
from cartridges_jax.data.conversations import write_shard
from cartridges_jax.data.examples import Example
from cartridges_jax.data.packing import plan_packing
from cartridges_jax.data.schema import Conversation, Message, TopLogprobs
from cartridges_jax.distill.learner import CartridgeLearner
from cartridges_jax.distill.step import init_state
from cartridges_jax.distill.step import train_step as take_step
from cartridges_jax.errors import UserError
from cartridges_jax.models import costs, load_model
from cartridges_jax.quantized import num_bytes


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """The tiny model as transformers and PEFT load it."""
    from cartridges_jax.benchmarks.peers import hugging_face, transformers_peft

    transformers_peft.use_threads(1)
    return hugging_face.export(tiny_model, tmp_path_factory.mktemp("exported"))


def config_of(name, model, tmp_path, **overrides):
    """A benchmark's defaults with a tiny model, one peer thread and one repeat."""
    (tmp_path / "doc.md").write_text(DOCUMENT)
    config = importlib.import_module(f"cartridges_jax.benchmarks.{name}").default_config()
    values = {
        "common.model": str(model), "common.document": str(tmp_path / "doc.md"), "common.repeats": 1, "common.threads": 1,
        **{field.replace("__", "."): value for field, value in overrides.items()},
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


def well_formed(record, workdir, capsys):
    """The last line, the file and the figure; returns the line's content."""
    line = capsys.readouterr().out.splitlines()[-1]
    printed = json.loads(line)
    name = printed["benchmark"]
    assert printed == json.loads((workdir / f"{name}.json").read_text()) == json.loads(json.dumps(record))
    assert (workdir / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert {"benchmark", "rows", "value", "unit", "peers", "ratio", "fraction_of_limit", "machine"} <= set(printed)
    for row in printed["rows"]:
        assert row["value"] > 0 and row["fraction_of_limit"] > 0
        assert set(row["peers"]) == set(row["ratio"])
        assert all(value > 0 for value in [*row["peers"].values(), *row["ratio"].values()])
    assert printed["value"] == printed["rows"][0]["value"]
    assert printed["machine"]["matmul_gflops"] > 0 and printed["machine"]["bandwidth_gb_s"] > 0
    return printed


def random_conversations(model, count, k, rng):
    """Conversations with made-up targets."""
    found = []
    for number in range(count):
        text = model.tokenizer.decode(rng.integers(40, 120, 8).tolist())
        answer = [*rng.integers(40, 120, 5 + number % 3).tolist(), model.chat.end_of_turn_id]
        ids = np.argsort(rng.random((len(answer), 200)), axis=-1)[:, :k].astype(np.int32)
        top = np.log(np.full(ids.shape, 0.8 / k, np.float32))
        found.append(Conversation(
            [Message("user", text, model.tokenizer.encode(text)),
             Message("assistant", model.tokenizer.decode(answer), answer, TopLogprobs.from_dense(ids, top))],
            {"id": str(number)},
        ))  # fmt: skip
    return found


# From end to end


def test_the_train_step_runs_on_the_conversations_of_a_finished_run(talker_gguf, rng, tmp_path, capsys):
    (tmp_path / "study").mkdir()
    write_shard(
        tmp_path / "study" / "shard-00000.parquet", random_conversations(load_model(str(talker_gguf)), 9, 5, rng)
    )
    config = config_of(
        "train_step", talker_gguf, tmp_path, slots=(16,), peer_dtypes=("float32",), train__rows_per_step=2,
        train__row_tokens=96, conversations=str(tmp_path / "study"),
    )  # fmt: skip
    record = well_formed(run(config, tmp_path / "work"), tmp_path / "work", capsys)
    row = record["rows"][0]
    losses = row["first_losses"]
    assert losses["cartridges_jax"] == pytest.approx(losses["transformers+peft float32"], rel=1e-3)
    assert losses["cartridges_jax bfloat16 weights"] == pytest.approx(losses["cartridges_jax"], rel=0.02)
    assert row["variants"]["cartridges_jax bfloat16 weights"]["value"] > 0
    assert sum(record["length_histogram"].values()) == 9
    assert record["tokens"] <= record["padded_tokens"]
    if sys.platform == "linux":
        assert all(peak > 50e6 for peak in row["peak_bytes"].values())


def test_decode_runs_and_a_peer_that_is_not_installed_is_reported(talker_gguf, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(peers._NEEDS, peers.LLAMA_CPP, (("no_such_package",), "pip install …"))
    config = config_of(
        "decode", talker_gguf, tmp_path, slots=16, batches=(2, 3), prompt_tokens=18, new_tokens=4, variants=("bfloat16",),
        peer_dtypes=("float32",), transformers_rows=2,
    )  # fmt: skip
    record = well_formed(run(config, tmp_path / "work"), tmp_path / "work", capsys)
    assert record["rows"][0]["same_tokens"] == {"transformers+peft float32": 1.0}
    assert not record["rows"][1]["peers"]
    assert record["peers"]["llama.cpp"] is None and record["ratio"]["vllm"] is None
    assert record["absent"]["llama.cpp"] == "pip install …" and "vllm_python" in record["absent"]["vllm"]
    first = record["first_token_seconds"]["cartridges_jax"]
    assert first["cartridge"] > 0 and first["document"] > 0


def test_the_cache_sweep_runs(talker_gguf, tmp_path, capsys):
    config = config_of(
        "cache_sweep", talker_gguf, tmp_path, sizes=(8, 32), headline=8, batches=(2,), own_tokens=4, steps=2
    )
    record = well_formed(run(config, tmp_path / "work"), tmp_path / "work", capsys)
    assert {(row["kind"], row["slots"]) for row in record["rows"]} == {
        (kind, size) for kind in ("own", "shared") for size in (8, 32)
    }
    assert set(record["peers"]) == {"own 8", "own 32", "shared 32"}
    speed = {(row["kind"], row["slots"]): row["value"] for row in record["rows"]}
    for kind in ("own", "shared"):
        gain = record["gains"][f"{kind} 8 over 32"]
        assert gain["measured"] == pytest.approx(speed[kind, 8] / speed[kind, 32], rel=1e-3)
        assert gain["reached"] == pytest.approx(gain["measured"] / gain["limits_allow"], rel=1e-3)


def test_self_study_runs(talker_gguf, tmp_path, capsys):
    families = {f"study__families__{name}": float(name == "generic") for name in inputs.STUDY.families}
    config = config_of(
        "self_study", talker_gguf, tmp_path, chunk_tokens=90, peer_dtypes=("float32",), peer_rows=8,
        study__conversations=3, study__requests_per_batch=16, study__chunk_min_tokens=90, study__chunk_max_tokens=90,
        study__writer_temperature=1.0, study__writer_max_tokens=12, study__answer_temperature=1.0,
        study__answer_max_tokens=8, study__top_logprobs=4, **families,
    )  # fmt: skip
    record = well_formed(run(config, tmp_path / "work"), tmp_path / "work", capsys)
    assert record["rows"][0]["conversations"] >= 3 and record["rows"][0]["messages"] % 16 == 0


def test_the_launch_program_refuses_what_it_does_not_know(tmp_path):
    def launch(*arguments):
        command = [sys.executable, str(ROOT / "launch" / "benchmark.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)

    config = f"--config={ROOT / 'experiments' / 'benchmarks' / 'decode.py'}"
    done = launch("--config=none.py", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "none.py" in done.stderr.splitlines()[-1]
    done = launch(config, f"--workdir={tmp_path}", "--config.common.repeats=0")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: repeats=0")
    done = launch(config, f"--workdir={tmp_path}", "--config.batchs=(1,)")
    assert done.returncode == 2 and "cartridges_jax/benchmarks/" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_experiments_are_the_defaults(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.benchmark == name and config.common.repeats >= 5
    settings = getattr(importlib.import_module(f"cartridges_jax.benchmarks.{name}"), BENCHMARKS[name])
    assert dataclasses.is_dataclass(inputs.settings_of(settings, config))


# Both sides do the same work


def test_peft_s_loss_and_gradient_are_ours(tiny_model, exported, rng):
    import torch

    from cartridges_jax.benchmarks.peers import transformers_peft

    config = tiny_model.config
    prefix = random_prefix(rng, config, 7)
    examples = []
    for length, targets, k in ((19, 6, 4), (11, 5, 4), (26, 9, 6)):
        ids = np.argsort(rng.random((targets, config.vocab_size)), axis=-1)[:, :k].astype(np.int32)
        teacher = rng.dirichlet(np.ones(k + 1), targets)[:, :k]
        rows = np.sort(rng.choice(length - 1, targets, replace=False)).astype(np.int32)
        top = np.log(teacher).astype(np.float32)
        examples.append(Example.of(random_tokens(rng, config, length), rows, *(np.pad(
            part, ((0, 0), (0, 6 - k)), constant_values=fill) for part, fill in ((ids, 0), (top, -np.inf)))))  # fmt: skip

    recorder = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    plan = plan_packing(examples, num_steps=None, rows_per_step=2, row_tokens=45, micro_batches=1)
    learner = CartridgeLearner()
    start, trainable = learner.init(tiny_model, prefix)
    state, metrics = take_step(
        config, recorder, learner, tiny_model.params, start, learner.mask(start, trainable),
        init_state(trainable, recorder), plan.batch(0),
    )  # fmt: skip

    frozen = transformers_peft.load(exported, "float32")
    wrapped = transformers_peft.with_cartridge(
        frozen, np.asarray(prefix.keys), np.asarray(prefix.values), 1, trained=True
    )
    trainer = transformers_peft.Trainer(wrapped, learning_rate=1e-2, clip_norm=0.0)
    (members,) = train_step.members(plan)
    loss = trainer.loss(members)
    loss.backward()
    (parameter,) = trainer.parameters
    assert float(loss.detach()) == pytest.approx(float(metrics["loss"]), rel=1e-4)
    found = parameter.grad.reshape(6, config.num_layers, 2, config.num_kv_heads, config.head_dim)
    for place, name in enumerate(("keys", "values")):
        expected = np.asarray(state.opt_state[name])
        assert not expected[:, :, 0].any()
        np.testing.assert_allclose(
            found[:, :, place].permute(1, 2, 0, 3), expected[:, :, 1:], atol=2e-3 * np.abs(expected).max()
        )
    before = parameter.detach().clone()
    trainer.step(members)
    assert not torch.equal(before, parameter)
    assert all(not p.requires_grad for p in frozen.parameters())


def test_peft_generates_our_greedy_tokens_behind_a_cartridge_and_transformers_behind_a_document(
    tiny_model, exported, rng
):
    from cartridges_jax.benchmarks.peers import transformers_peft

    document = random_tokens(rng, tiny_model.config, 24).tolist()
    prompts = random_tokens(rng, tiny_model.config, 3, 8).tolist()
    prefix = sampling.prefill(tiny_model, document)
    ours = [g.token_ids for g in sampling.generate_tokens(tiny_model, prompts, prefix, max_tokens=10, stop_ids=())]
    plain = transformers_peft.load(exported, "float32")
    behind = transformers_peft.with_cartridge(
        plain, np.asarray(prefix.keys), np.asarray(prefix.values), 1, trained=False
    )
    # In turns, as the benchmark calls them: both are one model.
    assert transformers_peft.generate(behind, prompts, 10) == ours
    assert transformers_peft.generate(plain, [document + prompt for prompt in prompts], 10) == ours
    unlike = [document + prompts[0], document + prompts[1][:5]]
    padded, top = transformers_peft.generate_padded(plain, unlike, 10, 4)
    assert padded[0] == ours[0] and padded[1] == transformers_peft.generate(plain, unlike[1:], 10)[0]
    assert transformers_peft.generate(behind, prompts, 10) == ours
    assert top.shape == (10, 2, 4) and (top.exp().sum(-1) <= 1).all()


def test_a_model_that_is_no_plain_llama_has_no_peers(tmp_path, tiny_model):
    from cartridges_jax.benchmarks.peers import hugging_face

    other = dataclasses.replace(tiny_model, config=dataclasses.replace(tiny_model.config, logit_softcap=30.0))
    with pytest.raises(UserError, match="plain Llama"):
        hugging_face.export(other, tmp_path)


# Limits and times


def test_the_flops_of_a_step_equal_a_hand_count():
    """L=3, D=64, N=4, K=2, H=16, F=96, V from the tokenizer; conversations of 2 and 3 tokens behind 5 slots, 4 targets."""
    config = tiny_config()
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    # Keys seen: (5+1) + (5+2), and (5+1) + (5+2) + (5+3).
    seen = 13 + 21
    forward = 3 * (5 * 2 * weights + seen * 2 * (2 * 64))
    backward = 3 * (5 * 2 * weights + seen * 4 * (2 * 64))
    head = 4 * 2 * 64 * config.vocab_size
    assert costs.distillation_flops(config, [2, 3], 4, 5) == forward + backward + 2 * head


def test_a_decode_step_reads_the_weights_the_shared_slots_once_and_every_row_s_own(tiny_model):
    config = tiny_model.config
    per_token = 2 * 3 * 2 * 16 * 4
    assert costs.kv_bytes_per_token(config, jnp.float32) == per_token
    found = costs.decode_bytes(config, tiny_model.params, jnp.float32, 4, 100, 7)
    assert found == num_bytes(tiny_model.params) + per_token * (100 + 4 * 7)
    products = 3 * 2 * costs.layer_weights(config) + 2 * 64 * config.vocab_size
    assert costs.decode_flops(config, 4, 107) == 4 * (products + 3 * 4 * 64 * 107)


def test_candidates_take_turns_and_ratios_are_taken_within_rounds():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmups=1)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(times["a"].seconds) == 3
    # The machine became ten times slower in between: the ratio stays 2.
    assert Times((1.0, 10.0, 1.0)).times_faster_than(Times((2.0, 20.0, 2.0))) == 2
    assert Times((1.0, 3.0, 2.0)).per_second(4) == 2


def test_peak_memory_is_the_child_s_own(tmp_path, monkeypatch):
    """`ru_maxrss` of a child starts at what its parent held."""
    if sys.platform != "linux":
        pytest.skip("read from /proc")
    held = np.ones(2**27, np.uint8)
    held[:] = 2
    (tmp_path / "work.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('m', {memory.__file__!r}); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "m.reset_high_water_mark(); x = bytearray(b'1' * (1 << 25)); m.report_high_water_mark()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peak = memory.peak_bytes("work", {})
    assert 2**25 < peak < 2**27 and math.isfinite(held.sum())


def test_the_shipped_python_files_of_the_peers_import_no_peer_until_asked():
    code = "import sys, cartridges_jax.benchmarks.run, cartridges_jax.benchmarks.decode; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(), cwd=Path(ROOT)
    )
    assert done.stdout.strip() == "False"
