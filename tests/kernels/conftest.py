"""What tests of the kernels share."""

import pytest


@pytest.fixture
def interpreter(monkeypatch):
    """The interpreter, made to take one-element arrays as loop bounds, as NumPy 2.4 refuses to."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
