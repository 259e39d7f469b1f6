"""The shell's braces in names of shards: {000..099} and {a,b}."""

import itertools
import math
import re

from fastssl.errors import FastsslError

MANY = 10**6  # shards: more are a slip in a range


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for; braces of other kinds stay as they are.

    Raises:
        FastsslError: a range runs backwards, or there are more than MANY names.
    """
    choices = [_choices(piece, pattern) for piece in re.split(r"(\{[^{}]*\})", pattern)]
    if math.prod(map(len, choices)) > MANY:
        raise _too_many(pattern)
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(piece: str, pattern: str) -> list[str]:
    if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
        first, last = map(int, match.groups())
        if first > last:
            raise FastsslError(f"the range {piece} of shards runs backwards")
        if last - first >= MANY:  # before they are made
            raise _too_many(pattern)
        return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return piece[1:-1].split(",") if piece.startswith("{") and "," in piece else [piece]


def _too_many(pattern: str) -> FastsslError:
    return FastsslError(f"'{pattern}' names more than {MANY:,} shards: is its range right?")
