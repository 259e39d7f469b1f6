"""Small work is done by one thread, and the number of threads is what it was afterwards."""

from collections.abc import Iterator

import pytest
import torch

from fastssl.data.one_thread import SMALL, one_thread


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_work_is_done_by_one_thread() -> None:
    for pixels, threads in ((0, 1), (SMALL, 1), (SMALL + 1, 3)):
        with one_thread(pixels):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3


def test_an_error_sets_the_threads_back() -> None:
    @one_thread()
    def fails() -> None:
        assert torch.get_num_threads() == 1
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            fails()
        assert torch.get_num_threads() == 3
