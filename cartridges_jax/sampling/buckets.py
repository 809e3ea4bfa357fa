"""The sizes that programs are compiled for: few, and never far above the needed size.

A program of a large model takes seconds to compile, so sizes of nearly the same cost share
one: decoding 8 rows costs hardly more than decoding 2, all weights are read for both.
"""

from __future__ import annotations

READ_CHUNK = 256
_WIDTHS = (16, 32, 64, 128, READ_CHUNK)
_ROWS = (1, 8, *range(16, 129, 16))
_READ_ROWS = (1, 4, 16)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def row_bucket(num_rows: int) -> int:
    """Rows that decode together: 1, 8, then multiples of 16, and of 32 above 128."""
    return next((size for size in _ROWS if num_rows <= size), round_up(num_rows, 32))


def smaller_bucket(num_rows: int) -> int:
    """The largest size of a batch that is at most half of this one; 0 for 1."""
    return max((size for size in (*_ROWS, num_rows // 64 * 32) if 2 * size <= num_rows), default=0)


def read_rows(num_rows: int) -> int:
    """Prompts that are read together: 1, 4, 16, then multiples of 32.

    The cost of reading is per row: a smaller size and another dispatch for the rest are
    cheaper than a size of which more than a quarter is empty.
    """
    above = next((size for size in _READ_ROWS if num_rows <= size), round_up(num_rows, 32))
    if num_rows >= 0.75 * above:
        return above
    return above - 32 if above > 32 else max(size for size in _READ_ROWS if size <= num_rows)


def slot_bucket(num_tokens: int) -> int:
    """Slots of a row's own cache: 64, 96, 128, 192, 256, … 1,024, then multiples of 1,024.

    Every decode step reads all of them, so a power of two alone would cost up to half.
    """
    if num_tokens > 1024:
        return round_up(num_tokens, 1024)
    whole = max(64, power_of_two(num_tokens))
    most = whole * 3 // 4
    return most if 64 < num_tokens <= most else whole


def prompt_bucket(num_tokens: int) -> int:
    """Tokens of a prompt that is read: powers of two up to a chunk, then whole chunks."""
    return next((width for width in _WIDTHS if num_tokens <= width), round_up(num_tokens, READ_CHUNK))


def prefix_bucket(num_slots: int) -> int:
    """Slots of a prefix: multiples of 256, so that small prefixes of all sizes share their programs."""
    return round_up(num_slots, 256)


def top_bucket(num_top: int) -> int:
    """Log-probabilities per token that a batch returns: none, 5, 20, or a power of two."""
    return next((size for size in (0, 5, 20) if num_top <= size), power_of_two(num_top))
