"""On the device everything runs with its kernels."""

import pytest
import torch

from kvfold import packing
from kvfold.attention import dispatch
from kvfold.cache import store


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The Triton kernels, entered for one test."""
    if not torch.cuda.is_available():
        return
    for table in (dispatch.KERNELS, store.ENCODERS, packing.PACKERS):
        monkeypatch.setitem(table, "cuda", "")
    from kvfold.kernels import triton

    triton.enable()
