"""What sides of the benchmarks compute, where the suites take it for granted."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import test_augment, test_checkpoint, test_info_nce
from fastssl.ops import GaussianBlur, augment_
from fastssl.ops.photometric import COLUMNS


def test_what_metric_learning_computes() -> None:
    """Its loss is the authors' formula with the batch's keys in the place of the queue's oldest rows."""
    case = test_info_nce.queue_case("cpu", n=8, d=16, k=32)
    torch.manual_seed(0)
    step = test_info_nce.metric_learning(case)
    step()
    loss, *_ = step()  # the second time as the first
    query, key, queue = test_info_nce.inputs(case)
    query, key, queue = F.normalize(query), F.normalize(key), queue.clone()
    queue[:8] = key
    logits = query @ queue.T / test_info_nce.TEMPERATURE  # the positive of row i is column i
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(8)).detach())


def test_size_of_the_state() -> None:
    assert sum(tensor.nbytes for tensor in test_checkpoint.tensors(test_checkpoint.state())) == test_checkpoint.SIZE


@pytest.mark.parametrize("left_out", [None, GaussianBlur, "order"])
def test_augmenting_otherwise_is_noticed(left_out: Any) -> None:
    case = test_augment.make_case("cpu", 64, 32)
    rows = test_augment.parameters(case)
    if left_out is GaussianBlur:
        rows[:, COLUMNS.index("sigma")] = 0
    elif left_out:
        rows[:, COLUMNS.index("order")] = 0
    views = augment_(test_augment.pictures(case), test_augment.STEPS, rows)
    if left_out is None:
        test_augment.check(case, views)
    else:
        with pytest.raises(AssertionError):
            test_augment.check(case, views)
