"""Compiles CUDA C++ with the NVRTC that torch brings, loads and launches it: no toolkit."""

import ctypes
import functools
import sys
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


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: its number, and 64 bytes of which the first four are the value here."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


#: with the instructions that no other device has
HOPPER = "sm_90a"
#: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAX_SHARED = 8
#: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: kernels wait for the launch before by
#: themselves, see `common.cuh`
OVERLAP = Attribute(6, 0, (ctypes.c_int * 16)(1))


class Kernel:
    """A loaded kernel.

    Args:
        code: machine code for the device.
        name: of the kernel.
        device: its index.
        shared: bytes of dynamic shared memory of a program at most.
    """

    def __init__(self, code: bytes, name: str, device: int, shared: int) -> None:
        self.driver = driver()
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.device = device
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # a context, if there was none
            call = self.driver.cuModuleLoadData, ctypes.byref(self.module), code
            self._check("load a kernel", *call)
            find = self.driver.cuModuleGetFunction, ctypes.byref(self.function), self.module
            self._check("find a kernel", *find, name.encode())
            bound = self.driver.cuFuncSetAttribute, self.function, MAX_SHARED, shared
            self._check(f"give a program {shared} bytes of shared memory", *bound)

    def __call__(
        self, grid: tuple[int, int, int], threads: int, arguments: Sequence[object], shared: int
    ) -> None:
        """Launch on the current stream; it may begin before the launch before it has ended.

        Args:
            grid: programs.
            threads: of a program.
            arguments: tensors, ints (C's `int`) and floats (C's `double`).
            shared: bytes of dynamic shared memory of a program.
        """
        made = [_argument(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(made))(*(ctypes.addressof(x) for x in made))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        config = Config(grid, (threads, 1, 1), shared, stream, ctypes.pointer(OVERLAP), 1)
        launch = self.driver.cuLaunchKernelEx, ctypes.byref(config), self.function, pointers, None
        self._check("launch a kernel", *launch)

    def _check(self, what: str, call: Any, *arguments: object) -> None:
        error = call(*arguments)
        if error:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(error, ctypes.byref(text))
            said = (text.value or b"unknown").decode()
            raise RuntimeError(f"CUDA refused to {what}: {said} (error {error})")


def _argument(x: object) -> Any:
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_int(x) if isinstance(x, int) else ctypes.c_double(x)  # type: ignore[arg-type]


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        OSError: there is none.
        AttributeError: it is older than CUDA 11.8.
    """
    found = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    found.cuLaunchKernelEx  # noqa: B018 (raises where it is missing)
    return found


def load(source: str, name: str, options: Sequence[str], device: int, shared: int) -> Kernel:
    """The kernel `name` of a source on a device, with up to `shared` bytes of shared memory."""
    major, minor = torch.cuda.get_device_capability(device)
    arch = HOPPER if major == 9 else f"sm_{major}{minor}"
    return Kernel(cubin(source, arch, options, library()), name, device, shared)
