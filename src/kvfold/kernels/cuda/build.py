"""Compiles CUDA C++ for a device with the NVRTC that torch brings, and loads it: no toolkit."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch


def library() -> ctypes.CDLL:
    """The NVRTC that torch has loaded.

    Raises:
        OSError: there is none.
    """
    from torch.cuda import _utils

    found = getattr(_utils, "_get_gpu_rtc_library", None) or _utils._get_nvrtc_library
    return found()


def cubin(source: str, arch: str, options: Sequence[str], nvrtc: ctypes.CDLL) -> bytes:
    """Machine code of a source without includes.

    Args:
        source: CUDA C++.
        arch: such as `sm_90`.
        options: of NVRTC.
        nvrtc: its library.

    Raises:
        RuntimeError: with the compiler's log.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = [f"--gpu-architecture={arch}", *options]
    given = (ctypes.c_char_p * len(text))(*(option.encode() for option in text))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(text), given):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC refused a kernel for {arch}: {log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def load(source: str, name: str, options: Sequence[str], device: int) -> Any:
    """The kernel `name` of a source on a device, as torch launches it."""
    from torch.cuda._utils import _cuda_load_module

    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # a context, if there was none
        code = cubin(source, f"sm_{major}{minor}", options, library())
        return _cuda_load_module(code, [name])[name]  # type: ignore[index]
