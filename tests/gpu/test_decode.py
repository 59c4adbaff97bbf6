"""The compiled decode kernels against the float32 oracle, on a CUDA device."""

import pytest
import torch

from kvfold.attention.oracle import oracle
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from tests.cache.test_store import feed
from tests.gpu.test_cuda import bound

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "fisher4", "fisher2", "fisher2-post", "kivi4-g32"])
def test_the_kernel_equals_the_oracle_twice(name, dtype):
    """Twice the dtype's rounding of the output, and the same bits again."""
    decode = pytest.importorskip("kvfold.kernels.triton.decode")
    torch.manual_seed(41)
    store = LayerStore(*bound(name, "cuda", dtype=dtype), Timeline(4, 64, 128))
    keys, values = torch.randn(2, 2, 2, 701, 64, device="cuda", dtype=dtype)
    view = feed(store, keys, values, [700, 1])
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=dtype)
    assert decode.refuses(q, view) is None
    found, wanted = decode.attend(q, view, scaling=0.125), oracle(q, view, scaling=0.125)
    error = ((found.float() - wanted).norm() / wanted.norm()).item()
    rounding = ((wanted.to(dtype).float() - wanted).norm() / wanted.norm()).item()
    assert error < 2 * rounding + 1e-3, (error, rounding)
    assert torch.equal(found, decode.attend(q, view, scaling=0.125))
