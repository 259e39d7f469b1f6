"""Names of images and shards that are left out, and what happens to those that cannot be read."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastssl.errors import DataError, FastsslError

Report = Callable[[str, str], None]  # takes the name and the reason of something that cannot be read


def refuse(name: str, reason: str) -> NoReturn:
    """The `Report` of all who want whole data: what cannot be read ends it."""
    raise DataError(
        f"cannot read '{name}' ({reason}): repair it, or leave it out with --exclude FILE, a list of names, one a "
        "line; `python -m fastssl.data scan DATA --output FILE` writes it"
    )


class Exclusions:
    """The names to leave out: images, shards or folders; knows whether any was met.

    Args:
        path: a file with one name a line, as `scan` writes it; empty lines and those that begin with # say nothing.
        root: names may be relative to this folder, or to the current one.

    Raises:
        FastsslError: there is no such file, or it is not text.
    """

    def __init__(self, path: Path | None = None, root: str = ".") -> None:
        self.path, self._met = path, False
        self._names: set[str] = set()
        if path is None:
            return
        try:
            lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")  # names may hold other line ends
        except OSError as error:
            raise FastsslError(f"cannot read the list of excluded names '{path}' ({error.strerror})") from None
        for line in lines:
            if not line.strip() or line.startswith("#"):
                continue
            by_hand = {line, line.strip()}
            for name in by_hand | set(map(_unescaped, by_hand)):  # the latter by `as_line`
                self._names |= {os.path.abspath(name), os.path.abspath(os.path.join(root, name))}

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, name: str) -> bool:
        if not self._names or os.path.abspath(name) not in self._names:
            return False
        self._met = True
        return True

    def check(self, data: str) -> None:
        """Raise if there are names and the data had none of them: a list of other data, or paths that have moved."""
        if self._names and not self._met:
            raise FastsslError(
                f"'{data}' has none of the names in '{self.path}', such as '{min(self._names)}': give the list that "
                "`python -m fastssl.data scan` wrote for these data, or none"
            )


def as_line(name: str) -> str:
    """How a name stands in the list: absolute, so that the list holds from any folder."""
    return re.sub(r"[\\\n\r]", lambda match: _ESCAPES[match[0]], os.path.abspath(name))


def as_comment(text: str) -> str:
    """A line of the list that leaves out nothing."""
    return "# " + " ".join(text.split())


_ESCAPES = {"\\": r"\\", "\n": r"\n", "\r": r"\r"}
_PLAIN = {escape: plain for plain, escape in _ESCAPES.items()}


def _unescaped(line: str) -> str:
    return re.sub(r"\\[\\nr]", lambda match: _PLAIN[match[0]], line)
