"""The command `cartridges`: train, chat, evaluate, bench and aot, each also a program in `launch/`.

    cartridges train my.txt --out my.cartridge
    cartridges chat my.cartridge
    cartridges evaluate my.cartridge --corpus my.txt --questions my.jsonl
    cartridges bench decode --workdir runs/bench_decode
    cartridges aot --config.model=meta-llama/Llama-3.1-8B-Instruct --config.pod.topology=v5e:4x4 --config.mesh=tensor:16

`cartridges COMMAND --help` lists a command's own flags; `train` also takes those of a job (docs/parallel.md). Settings of a
run are flags too: --config.train.steps=100.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.program import define_job_flags, run_program

# A command's definition of its flags, which returns its main function.
Command = Callable[[], Callable[..., None]]


def train() -> Callable[..., None]:
    """cartridges train FILE… --out DIR: trains a cartridge on files, folders or glob patterns."""
    from ml_collections import config_flags

    from cartridges_jax.pipeline.config import default_config

    config = config_flags.DEFINE_config_dict("config", default_config(), "Settings of the run.")
    out = flags.DEFINE_string("out", None, "Directory for the finished cartridge.")
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run; by default OUT with .run appended.")
    questions = flags.DEFINE_string("questions", None, 'JSONL of {"question", "answers"} to evaluate on.')
    job = define_job_flags()

    def main(files: list[str]) -> None:
        if not files or not out.value:
            raise UserError("give files and a place for the cartridge: cartridges train my.txt --out my.cartridge")
        from cartridges_jax.checkpoint import load_cartridge, require_place_for, save_cartridge
        from cartridges_jax.pipeline.program import run_from_flags

        for file in files:
            if "," in file and len(files) > 1:
                raise UserError(
                    f"{file!r} has a comma in its name, which separates files: rename it or give its folder"
                )
        target, directory = os.path.expanduser(out.value), workdir.value or f"{out.value.rstrip('/')}.run"
        directory = os.path.expanduser(directory)
        require_place_for(target, directory)
        settings = config.value
        settings.corpus = files[0] if len(files) == 1 else ",".join(files)
        if questions.value:
            settings.questions = questions.value
        if run_from_flags(settings, directory, job()) is None:
            return
        cartridge = load_cartridge(Path(directory) / "cartridge")
        save_cartridge(target, cartridge.prefix, cartridge.metadata)
        print(f"Cartridge: {target}    (cartridges chat {target})")

    return main


def chat() -> Callable[..., None]:
    """cartridges chat CARTRIDGE: a conversation in the terminal, or with --prompt one answer."""
    directory = flags.DEFINE_string("cartridge", None, "Directory of the cartridge, or of a run.")
    prompt = flags.DEFINE_string("prompt", None, "One message to answer; without it a chat starts.")
    max_tokens = flags.DEFINE_integer("max_tokens", 128, "Longest answer, in tokens.", lower_bound=1)
    temperature = flags.DEFINE_float("temperature", 0.0, "0 answers greedily.", lower_bound=0.0)
    model_of = _define_model_flags()

    def main(arguments: list[str] | None = None) -> None:
        place = directory.value or (arguments or [None])[0]
        if not place:
            raise UserError("name a cartridge: cartridges chat my.cartridge (or --cartridge=my.cartridge)")
        from cartridges_jax import api as cj
        from cartridges_jax.chat import HELP
        from cartridges_jax.chat import chat as converse

        cartridge = cj.load_cartridge(_cartridge_in(place))
        metadata = cartridge.metadata
        model = model_of(cartridge)

        def answer(messages):
            # `model_of` has compared the weights.
            return cj.stream(
                model,
                messages,
                prefix=cartridge,
                max_tokens=max_tokens.value,
                temperature=temperature.value,
                allow_other_weights=True,
            )

        def write(text: str) -> None:
            print(text, end="", flush=True)

        if prompt.value is not None:
            for piece in answer([{"role": "user", "content": prompt.value}]):
                write(piece)
            write("\n")
            return
        names = ", ".join(document.name for document in metadata.documents)
        write(f"{names}: {metadata.num_tokens:,} tokens in {cartridge.prefix.num_slots} slots. {HELP}\n")
        converse(answer, read=lambda: input("\n> "), write=write)

    return main


def evaluate() -> Callable[..., None]:
    """cartridges evaluate CARTRIDGE --corpus FILE --questions FILE: measures a cartridge against its text in context."""
    source = flags.DEFINE_string("corpus", None, "The text: a file, a folder, a glob pattern or a list of these.")
    questions = flags.DEFINE_string("questions", None, 'JSONL of {"question", "answers"}; a SQuAD file brings its own.')
    conditions = flags.DEFINE_list("conditions", [], "Conditions to compare; by default those of a run.")
    max_questions = flags.DEFINE_integer("max_questions", 48, "At most this many, spread evenly; 0 is all.")
    model_of = _define_model_flags()

    def main(arguments: list[str]) -> None:
        if len(arguments) != 1 or not source.value:
            raise UserError("give a cartridge and its text: cartridges evaluate my.cartridge --corpus=my.txt")
        from cartridges_jax import api as cj
        from cartridges_jax.evaluation.evaluate import EvaluationSettings
        from cartridges_jax.evaluation.summary import comparison_table
        from cartridges_jax.pipeline.terminal import TerminalReporter

        corpus = cj.read_corpus(source.value)
        asked = cj.read_questions(questions.value) if questions.value else corpus.questions
        if not asked:
            raise UserError('there are no questions: give --questions=FILE, JSONL of {"question", "answers"}')
        settings = EvaluationSettings(max_questions=max_questions.value)
        if conditions.value:
            settings = dataclasses.replace(settings, conditions=tuple(conditions.value))
        settings.check()
        cartridge = cj.load_cartridge(_cartridge_in(arguments[0]))
        model = model_of(cartridge)
        with TerminalReporter().progress("evaluate", 1) as bar:
            found = cj.evaluate(model, corpus, cartridge, questions=asked, settings=settings, on_progress=bar.at)
        print(comparison_table(found.condition_list, found.metric_list, found.conditions))

    return main


def bench() -> Callable[..., None]:
    """cartridges bench NAME --workdir DIR: measures speed against other libraries on this machine."""
    import ml_collections
    from ml_collections import config_flags

    from cartridges_jax.benchmarks.run import BENCHMARKS, default_config

    # The settings depend on the benchmark, so its name is read before the flags are.
    name = next((argument for argument in sys.argv[1:] if argument in BENCHMARKS), None)
    config = config_flags.DEFINE_config_dict(
        "config", default_config(name) if name else ml_collections.ConfigDict(), "Settings."
    )
    workdir = flags.DEFINE_string("workdir", None, "Directory for results, e.g. runs/bench_decode.")

    def main(arguments: list[str]) -> None:
        if not name or not workdir.value:
            known = ", ".join(BENCHMARKS)
            raise UserError(
                f"name a benchmark ({known}) and a --workdir: cartridges bench decode --workdir=runs/decode"
            )
        from cartridges_jax.benchmarks.run import run

        run(config.value, Path(workdir.value))

    return main


def aot() -> Callable[..., None]:
    """cartridges aot --config.pod.topology=…: compiles a run's programs for hardware you do not have."""
    from ml_collections import config_flags

    from cartridges_jax.pipeline.config import default_config

    config = config_flags.DEFINE_config_dict("config", default_config(), "Settings of the run.")
    options = define_aot_flags()

    def main(arguments: list[str]) -> None:
        from cartridges_jax.aot.run import run
        from cartridges_jax.pipeline.config import from_config_dict
        from cartridges_jax.pipeline.pod import workload_of

        run(workload_of(from_config_dict(config.value)), **options())

    return main


COMMANDS: dict[str, Command] = {
    "train": train,
    "chat": chat,
    "evaluate": evaluate,
    "bench": bench,
    "aot": aot,
}


def _cartridge_in(place: str) -> Path:
    """The cartridge's directory, given it or the run that trained it."""
    path = Path(place).expanduser()
    return path / "cartridge" if (path / "run.json").exists() else path


def _define_model_flags() -> Callable[[Any], Any]:
    """Defines --model and --allow_other_weights; returns a function that loads the model of a cartridge."""
    name = flags.DEFINE_string(
        "model", None, "The model; needed for a cartridge that was trained for a local file or directory."
    )
    other_weights = flags.DEFINE_bool(
        "allow_other_weights", False, "Accept a cartridge trained with other weights of the same architecture."
    )

    def model_of(cartridge):
        from cartridges_jax.checkpoint import check_compatible
        from cartridges_jax.models import load_model

        metadata = cartridge.metadata
        model = load_model(name.value or metadata.model_to_load(), **metadata.model_options)
        check_compatible(metadata, model, allow_other_weights=other_weights.value)
        return model

    return model_of


# Where the fields of a command's config are documented, for the message about an unknown one.
_FIELDS = {
    "train": "cartridges_jax/pipeline/config.py lists the fields",
    "bench": "the settings classes in cartridges_jax/benchmarks/ list the fields",
}


def define_aot_flags() -> Callable[[], dict]:
    """Defines the flags of ahead-of-time compiling; returns a function that gives their values."""
    programs = flags.DEFINE_list(
        "programs",
        [],
        "Programs to compile: train, prefill and decode by default; whole_text is evaluation's read of the text.",
    )
    sweep = flags.DEFINE_bool("sweep", False, "Try all meshes of the topology.")
    scaling = flags.DEFINE_bool("scaling", False, "Project the train step from 1 to 512 chips.")
    return lambda: {"programs": programs.value, "sweep": sweep.value, "scaling": scaling.value}


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        lines = [__doc__.strip()] if name.lstrip("-") in ("help", "h") else []
        if not lines:
            print(f"error: cartridges has no command {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
            sys.exit(UserError.exit_code)
        print("\n".join(lines))
        return
    command = COMMANDS[name]
    if name == "aot":
        # The devices are described to the compiler, not looked for.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run_program(argv=[f"cartridges {name}", *sys.argv[2:]], command=command, fields=_FIELDS.get(name, _FIELDS["train"]))


if __name__ == "__main__":
    main()
