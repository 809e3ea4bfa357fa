"""A terminal chat with a cartridge, or one answer.

python launch/chat.py --cartridge=runs/quickstart/cartridge
python launch/chat.py --cartridge=runs/quickstart/cartridge --prompt="How many steps does the tower have?"
"""

import sys

from absl import flags

from cartridges_jax.pipeline.program import run_program

_CARTRIDGE = flags.DEFINE_string("cartridge", None, "Directory of the cartridge.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "One message to answer; without it, a chat starts.")
_MODEL = flags.DEFINE_string("model", None, "The model's new place, if it has moved since the cartridge was trained.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Longest answer, in tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 answers greedily.", lower_bound=0.0)


def main() -> None:
    import cartridges_jax as cj

    cartridge = cj.load_cartridge(_CARTRIDGE.value)
    metadata = cartridge.metadata
    model = cj.load_model(_MODEL.value or metadata.model_name, **metadata.model_options)

    def answer(turns):
        return cj.generate(
            model, [turns], prefix=cartridge, max_tokens=_MAX_TOKENS.value, temperature=_TEMPERATURE.value
        )[0]

    if _PROMPT.value is not None:
        print(answer([{"role": "user", "content": _PROMPT.value}]))
        return
    corpus = metadata.corpus
    print(f"{corpus.name}: {corpus.tokens:,} tokens in {cartridge.prefix.num_slots} slots. Empty line or Ctrl-D ends.")
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
