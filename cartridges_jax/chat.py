"""A conversation in a terminal with a cartridge as its prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cartridges_jax.errors import UserError

HELP = "/new starts over, /undo takes the last question back, /quit or Ctrl-D ends."

# The conversation so far to the answer, piece by piece.
Answer = Callable[[list[dict[str, str]]], Iterator[str]]


class TooLong(UserError):
    """A conversation that does not fit the model's context."""


def chat(answer: Answer, *, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answers line after line until the input ends; an error is reported and the chat continues.

    A conversation that outgrows the model's context loses its oldest question and answer, and the chat says so.

    Args:
      answer: raises `TooLong` before its first piece where the conversation does not fit.
      read: returns the next message; raises EOFError at the end of the input.
      write: receives text as it appears, line breaks included.
    """
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = read().strip()
        except EOFError:
            write("\n")
            return
        except UnicodeDecodeError as error:
            write(f"this line is not UTF-8 ({error.reason} at byte {error.start}); it was ignored\n")
            continue
        if line == "/quit":
            return
        if line == "/new":
            messages = []
            write("a new conversation\n")
        elif line == "/undo":
            write("the last question and its answer are gone\n" if messages else "there is nothing to undo\n")
            messages = messages[:-2]
        elif line.startswith("/"):
            write(f"there is no command {line.split()[0]}. {HELP}\n")
        elif line:
            # A terminal may hand over bytes that are no text as lone surrogates.
            text = line.encode("utf-8", "replace").decode("utf-8")
            messages = _answered([*messages, {"role": "user", "content": text}], answer, write)


def _answered(messages: list[dict[str, str]], answer: Answer, write: Callable[[str], None]) -> list[dict[str, str]]:
    """Writes the answer to the last message; returns the conversation with it, or without the message if it failed."""
    pieces: list[str] = []
    while True:
        try:
            for piece in answer(messages):
                pieces.append(piece)
                write(piece)
        except TooLong as error:
            if len(messages) == 1:
                write(f"{error}\n")
                return []
            write("(the conversation has outgrown the model's context: its oldest question and answer were dropped)\n")
            messages = messages[2:]
            continue
        except UserError as error:
            write(f"{error}\n")
            return messages[:-1]
        except KeyboardInterrupt:
            # The answer so far is the answer.
            write(" …")
        write("\n")
        return [*messages, {"role": "assistant", "content": "".join(pieces)}]
