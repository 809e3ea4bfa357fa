"""The sizes that programs are compiled for: few, and never far above what is needed."""
from __future__ import annotations

READ_CHUNK = 256
_WIDTHS = (16, 32, 48, 64, 96, 128, 192, READ_CHUNK)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def row_bucket(num_rows: int) -> int:
    """Rows of a batch: powers of two up to 32, then multiples of 32."""
    return power_of_two(num_rows) if num_rows <= 32 else round_up(num_rows, 32)


def slot_bucket(num_tokens: int) -> int:
    """Slots of a row's own cache: powers of two from 64 to 1,024, then multiples of 1,024."""
    return max(64, power_of_two(num_tokens)) if num_tokens <= 1024 else round_up(num_tokens, 1024)


def prompt_bucket(num_tokens: int) -> int:
    """Tokens of a prompt that is read: two sizes an octave up to a chunk, then whole chunks."""
    return next((width for width in _WIDTHS if num_tokens <= width), round_up(num_tokens, READ_CHUNK))


def prefix_bucket(num_slots: int) -> int:
    """Slots of a prefix: multiples of 64 up to 512, then of 256."""
    return round_up(num_slots, 64 if num_slots <= 512 else 256)


def top_bucket(num_top: int) -> int:
    """Log-probabilities per token that a batch returns: none, 5, 20, or a power of two."""
    return next((size for size in (0, 5, 20) if num_top <= size), power_of_two(num_top))
