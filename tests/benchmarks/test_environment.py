"""What is told of a machine fits into JSON, and what cannot be told stops nothing."""

import json

import pytest
import torch

from benchmarks import environment


def test_it_is_json_with_what_the_summary_says() -> None:
    found = json.loads(json.dumps(environment.environment()))
    assert {"date", "commit", "cuda", "driver"} < set(found) and found["torch"] == torch.__version__
    assert len(found["gpus"]) == torch.cuda.device_count() and found["fastssl"]["versions"]["torch"] == found["torch"]


def test_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("cuDNN is of another version")

    monkeypatch.setattr(torch.backends.cudnn, "version", broken)
    monkeypatch.setenv("PATH", "")  # neither git nor nvidia-smi
    found = environment.environment()
    assert "cuDNN is of another version" in found["cudnn"]
    assert found["commit"] is None and found["driver"] is None
