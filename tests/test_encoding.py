"""Codecs on plain tensors and numpy arrays."""

import numpy as np
import pytest
import torch

import kvfold
from kvfold.codec import CodecError


def test_tensors_and_arrays_round_trip():
    x = torch.randn(2, 3, 300, 64)
    code = kvfold.encode(x, "int8", side="value")
    assert code.nbytes == 2 * 3 * 3 * 128 * 64 * 8.25 / 8
    assert code.bits_per_element == 8.25
    assert (code.decode() - x).norm() / x.norm() < 0.01
    array = kvfold.encode(x.numpy(), "int8", side="value").decode()
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, code.decode().numpy())


def test_bad_input_is_refused():
    x = torch.randn(2, 3, 10, 64)
    with pytest.raises(
        CodecError, match=r"shape \(3, 10, 64\).*\[rows, kv_heads, tokens, head_dim\]"
    ):
        kvfold.encode(x[0], "int8")
    with pytest.raises(CodecError, match=r"dtype torch\.int64"):
        kvfold.encode(x.long(), "int8")
    with pytest.raises(CodecError, match="side is 'key' or 'value'"):
        kvfold.encode(x, "int8", side="keys")
    with pytest.raises(CodecError, match=r"positions have shape \(2, 9\)"):
        kvfold.encode(x, "int8", positions=torch.zeros(2, 9))
    x[1, 2, 3, 4] = float("inf")
    with pytest.raises(CodecError, match="key_states contain NaN or Inf"):
        kvfold.encode(x, "int8")
