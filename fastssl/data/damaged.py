"""Which images of a batch that failed are to blame."""

from collections.abc import Callable, Sequence

from fastssl.data.check import fault
from fastssl.data.decode import HINT
from fastssl.errors import DataError, FastsslError

LISTED = 20  # of the images that one error names
Item = tuple[str, Callable[[], bytes]]  # name of an image, and what reads it


def report(items: Sequence[Item], error: Exception) -> FastsslError:
    """The error that names every image of a batch that cannot be read or decoded.

    Args:
        items: the batch, if it was of encoded images.
        error: what was raised; DALI does not know names.
    """
    errors = [found for name, read in items if (found := fault(name, read)) is not None]
    if not errors:
        each = ", and each image of the batch by itself is fine" if items else ""
        return FastsslError(f"DALI failed{each}: {_last_line(error)}")
    if len(errors) == 1:
        return errors[0]
    lines = [f"  {found.name} ({found.reason})" for found in errors[:LISTED]]
    if len(errors) > LISTED:
        lines.append(f"  … and {len(errors) - LISTED} more")
    return DataError("\n".join([f"cannot read {len(errors)} images:", *lines, HINT]))


def _last_line(error: Exception) -> str:
    """What went wrong, of DALI's many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line and "ipeline" not in line), lines[-1] if lines else "")
