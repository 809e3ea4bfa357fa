"""A terminal chat with a cartridge, or one answer.

python launch/chat.py --cartridge=runs/quickstart/cartridge
python launch/chat.py --cartridge=runs/quickstart/cartridge --prompt="How many steps does the tower have?"
"""

from cartridges_jax.cli import chat
from cartridges_jax.pipeline.program import run_program

if __name__ == "__main__":
    run_program(chat())
