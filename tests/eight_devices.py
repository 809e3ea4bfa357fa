"""The same work on one device and on meshes of eight, in processes of their own; results go to a pickle.

    python tests/eight_devices.py train|compile|sample|evaluate|study MODEL.gguf OUT.pickle WEIGHTS MESH… FLAGS_OF_A_JOB

OUT holds {mesh: results}; the mesh "" is one device. Results are those of the first process; the other ones must
take part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

STEPS, SLOTS = 20, 16


def results_of(
    work: str, model: Path, meshes: list[str], directory: Path, weights: str = "", processes: int = 1
) -> dict[str, dict]:
    """Starts this program and reads what it leaves.

    Args:
      weights: as of `load_model`.
      processes: that share the eight devices.
    """
    out = directory / f"{work}.pickle"
    arguments = [__file__, work, str(model), str(out), weights, *meshes]
    if processes > 1:
        launcher = Path(__file__).parents[1] / "launch" / "local_multiprocess.py"
        arguments = [str(launcher), f"--processes={processes}", f"--devices={8 // processes}", "--", *arguments]
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return pickle.loads(out.read_bytes())


def task(model):
    """(initial cartridge, examples): random prefix, conversations and teachers."""
    from targets import random_targets
    from tiny import random_prefix, random_tokens

    from cartridges_jax.data.examples import Example

    rng = np.random.default_rng(3)
    examples = []
    for _ in range(60):
        tokens = random_tokens(rng, model.config, int(rng.integers(8, 20)))
        rows = np.sort(rng.choice(len(tokens) - 1, int(rng.integers(2, 6)), replace=False)).astype(np.int32)
        _, ids, logprobs = random_targets(rng, len(rows), model.config.vocab_size, 4)
        examples.append(Example.of(tokens, rows, ids, logprobs))
    return random_prefix(rng, model.config, SLOTS), examples


def trained(model, job) -> dict:
    """Twenty steps of two micro-batches; the cartridge and the losses, and the parts of batches that each process made."""
    from test_trainer import SETTINGS

    from cartridges_jax.data.packing import PackingPlan
    from cartridges_jax.distill.trainer import train

    made, part = set(), PackingPlan.part
    PackingPlan.part = lambda plan, step, number: (made.add(number), part(plan, step, number))[1]
    initial, examples = task(model)
    settings = dataclasses.replace(
        SETTINGS,
        steps=STEPS,
        learning_rate=1e-2,
        rows_per_step=16,
        micro_batches=2,
        eval_every=STEPS,
        checkpoint_every=STEPS,
    )
    with tempfile.TemporaryDirectory() as directory:
        result = train(model, initial, examples[:50], examples[50:], settings, Path(directory), seed=7, job=job)
    PackingPlan.part = part
    return {
        "keys": np.asarray(result.prefix.keys),
        "values": np.asarray(result.prefix.values),
        "train": [entry["loss"] for entry in result.history["train"]],
        "heldout": [entry["loss"] for entry in result.history["heldout"]],
        "parts": everyone(job, sorted(made)),
    }


def compiled(model, job) -> dict:
    """What a compiled step sends, as (operation, type, shape), and how its state and its results lie."""
    import jax
    import optax

    from cartridges_jax import parallel
    from cartridges_jax.aot.hlo import collectives
    from cartridges_jax.data.packing import plan_packing
    from cartridges_jax.distill.learner import CartridgeLearner
    from cartridges_jax.distill.sharding import batch_shardings, state_shardings, step_on_mesh
    from cartridges_jax.distill.step import init_state

    initial, examples = task(model)
    mesh, optimizer = model.mesh, optax.adam(1e-2)
    plan = plan_packing(
        examples, num_steps=1, rows_per_step=16, row_tokens=48, micro_batches=2, row_parts=parallel.row_parts(mesh)
    )
    learner = CartridgeLearner()
    frozen, trainable = learner.init(model, parallel.place_prefix(initial, mesh))
    state = init_state(trainable, optimizer, state_shardings(mesh, optimizer, learner, trainable))
    step = step_on_mesh(model.config, optimizer, learner, mesh, model.params, frozen, state, tail="class", remat=False)
    batch = parallel.place(plan.batch(0), batch_shardings(mesh))
    program = step.lower(model.params, frozen, learner.mask(frozen, trainable), state, batch).compile()
    return {
        "sent": {(one.kind, dtype, shape) for one in collectives(program.as_text()) for dtype, shape in one.arrays},
        "shards": {
            jax.tree_util.keystr(path): (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        },
        "num_targets": plan.num_targets,
        "batch": {name: part.sharding.shard_shape(part.shape) for name, part in batch._asdict().items()},
    }


def sampled(model, job) -> dict:
    """Greedy and drawn tokens behind a prefix, more requests than rows."""
    from tiny import random_prefix, random_tokens

    from cartridges_jax import sampling

    rng = np.random.default_rng(4)
    prefix = random_prefix(rng, model.config, 21)
    prompts = [random_tokens(rng, model.config, length).tolist() for length in (3, 40, 17, 5, 9, 70, 1, 12, 33, 8, 25)]
    answers = {
        name: sampling.generate_tokens(
            model, prompts, prefix, max_tokens=20, stop_ids=(), top_logprobs=3, seed=5, sampling=how, batch_size=8
        )
        for name, how in {"greedy": sampling.GREEDY, "drawn": sampling.Sampling(0.8, top_k=20)}.items()
    }
    return {
        **{name: [generation.token_ids for generation in found] for name, found in answers.items()},
        "logprobs": np.concatenate([generation.top_logprobs for generation in answers["greedy"]]),
    }


def evaluated(model, job) -> dict:
    """The measures of the default conditions."""
    from test_evaluation import DOCUMENT, NUM_SLOTS, QUESTIONS, SETTINGS, corpus_of, tasks_of

    from cartridges_jax.evaluation.conditions import make_conditions
    from cartridges_jax.evaluation.evaluate import evaluate
    from cartridges_jax.prefixes.first_tokens import initialise_from_first_tokens

    prefixes = make_conditions(
        model, corpus_of(model), initialise_from_first_tokens(model, DOCUMENT.text, NUM_SLOTS), room=80
    )
    measured = evaluate(model, prefixes, tasks_of(model, QUESTIONS), SETTINGS)
    return {"measures": measured.conditions, "answers": measured.answers}


def studied(model, job) -> dict:
    """Self-study's conversations, and the shards that each process wrote."""
    from tiny_runs import DOCUMENT, config_of, settings

    from cartridges_jax.corpus import Corpus, tokenize_corpus
    from cartridges_jax.selfstudy import shards, synthesis

    chosen = config_of(settings(model.name, Path())).study
    written, write_shard = [], shards.write_shard

    def noted(path, conversations):
        written.append(path.name)
        write_shard(path, conversations)

    shards.write_shard = noted
    with tempfile.TemporaryDirectory() as directory:
        shared = Path(job.from_first(lambda: directory))
        corpus = tokenize_corpus(Corpus.from_text(DOCUMENT, "doc"), model.tokenizer)
        conversations = synthesis.synthesise(model, corpus, shared, chosen, seed=5, job=job).conversations
        job.wait_for_all()
    mine = [[c.metadata["id"], *(m.content for m in c.messages)] for c in conversations]
    return {"conversations": everyone(job, mine), "written": everyone(job, written)}


def everyone(job, value) -> list:
    """What every process has of a JSON value, in the first one."""
    with tempfile.TemporaryDirectory() as directory:
        shared = Path(job.from_first(lambda: directory))
        (shared / str(job.process)).write_text(json.dumps(value))
        job.wait_for_all()
        found = [
            json.loads((shared / str(process)).read_text()) for process in range(job.num_processes) if job.is_first
        ]
        job.wait_for_all()
    return found


WORKS = {"train": trained, "compile": compiled, "sample": sampled, "evaluate": evaluated, "study": studied}


def main() -> None:
    from cartridges_jax.models import load_model
    from cartridges_jax.parallel import make_mesh, start_job

    flags = dict(argument[2:].split("=") for argument in sys.argv if argument.startswith("--"))
    work, path, out, weights, *meshes = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    with start_job(**{name: int(value) if value.isdecimal() else value for name, value in flags.items()}) as job:
        results = {mesh: WORKS[work](load_model(path, weights=weights, mesh=make_mesh(mesh)), job) for mesh in meshes}
        if job.is_first:
            Path(out).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
