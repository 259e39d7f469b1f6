"""What tests of the ops that are compiled for both devices share."""

from collections.abc import Iterator

import pytest
import torch

from fastssl import _extension
from fastssl.ops import use_backend


@pytest.fixture(params=("native", "reference", *(["cuda"] if torch.cuda.is_available() else [])))
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test that asks for a device runs on each backend."""
    if request.param != "reference" and (why := _extension.missing()):
        pytest.skip(why)
    with use_backend(request.param):
        yield "cuda" if request.param == "cuda" else "cpu"
