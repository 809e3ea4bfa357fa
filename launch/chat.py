"""A terminal chat with a cartridge as its prefix, or one answer.

python launch/chat.py --cartridge=runs/quickstart/cartridge
python launch/chat.py --cartridge=runs/quickstart/cartridge --prompt="How many steps does the tower have?"
"""

import pathlib
import sys

from absl import flags

from cartridges_jax.errors import UserError
from cartridges_jax.pipeline.program import run_program

_CARTRIDGE = flags.DEFINE_string("cartridge", None, "Directory of the cartridge.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "One message to answer; without it a chat starts.")
_MODEL = flags.DEFINE_string(
    "model", None, "Model; needed for a cartridge that was trained for a local file or directory."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Longest answer, in tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 answers greedily.", lower_bound=0.0)
_ALLOW_OTHER_WEIGHTS = flags.DEFINE_bool(
    "allow_other_weights", False, "Accept a cartridge that was trained with other weights of the same architecture."
)


def main() -> None:
    import cartridges_jax as cj

    cartridge = cj.load_cartridge(_CARTRIDGE.value)
    metadata = cartridge.metadata
    # The cartridge stores no path, but the last part of one may name the model here.
    if _MODEL.value is None and metadata.model_is_local and not pathlib.Path(metadata.model_name).exists():
        raise UserError(
            f"this cartridge was trained for the local model {metadata.model_name!r}: give its path with --model=PATH"
        )
    model = cj.load_model(_MODEL.value or metadata.model_name, **metadata.model_options)

    def answer(turns):
        return cj.generate(
            model,
            [turns],
            prefix=cartridge,
            max_tokens=_MAX_TOKENS.value,
            temperature=_TEMPERATURE.value,
            allow_other_weights=_ALLOW_OTHER_WEIGHTS.value,
        )[0]

    if _PROMPT.value is not None:
        print(answer([{"role": "user", "content": _PROMPT.value}]))
        return
    names = ", ".join(document.name for document in metadata.documents)
    print(f"{names}: {metadata.num_tokens:,} tokens in {cartridge.prefix.num_slots} slots. Empty line or Ctrl-D ends.")
    turns = []
    while True:
        try:
            message = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            message = ""
        if not message:
            print(file=sys.stdout)
            return
        turns.append({"role": "user", "content": message})
        turns.append({"role": "assistant", "content": answer(turns)})
        print(turns[-1]["content"])


if __name__ == "__main__":
    run_program(main)
