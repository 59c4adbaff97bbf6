"""Triton kernels for CUDA devices: folding, and attention on packed pages (see `decode`).

They are entered by `enable`, not by default: in their present form they have run in Triton's
interpreter and been compiled for sm_90, but not on a device.
"""

from kvfold import packing
from kvfold.attention import dispatch
from kvfold.cache import store


def enable() -> None:
    """Let CUDA tensors be folded and attended to by these kernels, in this process.

    Decode steps are then recorded as CUDA graphs too, where a model allows it.

    Raises:
        ImportError: triton is not installed.
    """
    import triton  # noqa: F401 (missing where torch has no CUDA: said here, not in a forward pass)

    dispatch.KERNELS["cuda"] = "kvfold.kernels.triton.decode"
    store.ENCODERS["cuda"] = packing.PACKERS["cuda"] = "kvfold.kernels.triton.fold"
