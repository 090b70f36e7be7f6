"""CUDA C++ sources compiled at first use by NVRTC and launched on torch's current stream of their device.

The binding is NVIDIA's own `cuda-bindings` package, which torch's CUDA wheels for Linux bring along; neither nvcc nor a
C++ compiler is needed on the user's machine. Nothing happens at import.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Argument = Tensor | ctypes.c_int32 | ctypes.c_uint64 | ctypes.Structure

OWN_INSTRUCTIONS = {90: "a"}
"""Suffix of the target that has all instructions of a capability: code for it runs on no other, and none needs to."""
DEFAULT_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that a kernel gets without asking for more."""


class CudaError(RuntimeError):
    """A call into NVRTC or the CUDA driver failed; the message has the call, the code and any compiler log."""


def why_unavailable(device: torch.device) -> str | None:
    """None where kernels can be compiled for `device`, otherwise the reason, in one line."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device.type}"
    import torch

    from ..hardware.features import why_off

    off = why_off("nvrtc")
    if off is not None:
        return off
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, not a ROCm build of torch"
    # Both are of PyTorch's CUDA version: the compiler's library is loaded by its number.
    cuda = int((torch.version.cuda or "13").split(".")[0])
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f'cuda-bindings cannot be imported ({error}); pip install "cuda-bindings=={cuda}.*"'
    try:
        supported = _checked("nvrtcGetSupportedArchs", nvrtc.nvrtcGetSupportedArchs())
    except (RuntimeError, OSError) as error:
        package = "nvidia-cuda-nvrtc" if cuda >= 13 else f"nvidia-cuda-nvrtc-cu{cuda}"
        return (
            f'the NVRTC library cannot be loaded ({error}); pip install "cuda-bindings=={cuda}.*" {package}'
        ).replace("\n", " ")
    capability = _capability(device)
    if capability < min(supported):
        return f"this NVRTC compiles for compute capability {min(supported) / 10} up, the GPU has {capability / 10}"
    return None


def load(source: str, device: torch.device, defines: Mapping[str, int] | None = None) -> Module:
    """The compiled form of `source`, a .cu file by its path in the package; compiled once per device and defines."""
    return _load(source, source_text(source), _index(device), tuple(sorted((defines or {}).items())))


def source_text(source: str) -> str:
    """A .cu file by its path in the package, with the headers of this folder that it includes in their places."""
    package = resources.files(__package__.partition(".")[0])
    text = package.joinpath(source).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda found: source_text(f"kernels/{found[1]}"), text, flags=re.MULTILINE)


@functools.cache
def _load(name: str, text: str, device_index: int, defines: tuple[tuple[str, int], ...]) -> Module:
    import torch

    device = torch.device("cuda", device_index)
    return Module(compile_image(name, text, _capability(device), dict(defines)), device)


def compile_image(name: str, text: str, capability: int, defines: Mapping[str, int]) -> bytes:
    """Machine code for a GPU of `capability` (90 for 9.0), or PTX where the GPU is newer than the compiler.

    Raises:
        CudaError: the source does not compile; the message is the compiler's log.
    """
    from cuda.bindings import nvrtc

    supported = _checked("nvrtcGetSupportedArchs", nvrtc.nvrtcGetSupportedArchs())
    target = max(arch for arch in supported if arch <= capability)
    exact = target == capability
    suffix = OWN_INSTRUCTIONS.get(target, "") if exact else ""
    options = [f"--gpu-architecture={'sm' if exact else 'compute'}_{target}{suffix}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in defines.items()]
    encoded = [option.encode() for option in options]
    program = _checked("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CudaError(f"{name} does not compile with {' '.join(options)}:\n{_compiler_log(program)}")
        get_size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if exact else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        image = bytearray(_checked("nvrtc size of the image", get_size(program)))
        _checked("nvrtc image", get(program, image))
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Module:
    """Machine code, or PTX with a zero behind it, loaded on one device."""

    def __init__(self, image: bytes, device: torch.device) -> None:
        from cuda.bindings import driver

        self.device = device
        self._image = image
        with _context(device):
            self._module = _checked("cuModuleLoadData", driver.cuModuleLoadData(image))
        self._kernels: dict[tuple[str, int], CudaKernel] = {}
        self._most_shared: dict[str, int] = {}
        self._lock = threading.Lock()

    def kernel(self, name: str, shared_bytes: int = 0) -> CudaKernel:
        """The `extern "C"` function `name`, prepared for up to `shared_bytes` of dynamic shared memory."""
        key = (name, shared_bytes)
        if key not in self._kernels:
            self._prepare(name, shared_bytes)
        return self._kernels[key]

    def _prepare(self, name: str, shared_bytes: int) -> None:
        from cuda.bindings import driver

        with self._lock, _context(self.device):  # all pipelines on a card share its modules
            function = _checked("cuModuleGetFunction", driver.cuModuleGetFunction(self._module, name.encode()))
            # What is allowed belongs to the function, which all kernels of this name share: it must never fall.
            if shared_bytes > self._most_shared.get(name, DEFAULT_SHARED_BYTES):
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked("cuFuncSetAttribute", driver.cuFuncSetAttribute(function, attribute, shared_bytes))
                self._most_shared[name] = shared_bytes
            self._kernels[name, shared_bytes] = CudaKernel(name, function, self.device, shared_bytes)


class CudaKernel:
    """A launchable function."""

    def __init__(self, name: str, function: Any, device: torch.device, shared_bytes: int) -> None:
        self.name = name
        self.device = device
        self.shared_bytes = shared_bytes
        self._function = function

    def resident_blocks(self, threads: int) -> int:
        """Blocks of `threads` threads that the whole GPU holds at a time.

        Raises:
            CudaError: one block asks for more than this GPU has.
        """
        import torch
        from cuda.bindings import driver

        with _context(self.device):
            blocks = _checked(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, self.shared_bytes),
            )
        if blocks == 0:
            raise CudaError(
                f"{self.name} needs {threads} threads and {self.shared_bytes} bytes of shared memory a block"
            )
        return int(blocks) * torch.cuda.get_device_properties(self.device).multi_processor_count

    def __call__(self, grid: tuple[int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """Launch on torch's current stream of the kernel's device; may be captured in a CUDA graph.

        A tensor is passed as its data pointer; ctypes numbers and structures are passed as they are.
        """
        import torch
        from cuda.bindings import driver

        values = [ctypes.c_uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        with _context(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            result = driver.cuLaunchKernel(
                self._function, grid[0], grid[1], 1, threads, 1, 1, self.shared_bytes, stream,
                ctypes.addressof(pointers), 0,
            )  # fmt: skip
        _checked(f"launch of {self.name}", result)


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """The device's context is this thread's current one inside, also in a thread's first call and the device's."""
    import torch
    from cuda.bindings import driver

    from ..ops.device import enter

    with torch.cuda.device(device):
        if not int(_checked("cuCtxGetCurrent", driver.cuCtxGetCurrent())):
            enter(device)
        yield


def max_shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may use, in bytes."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    handle = _checked("cuDeviceGet", driver.cuDeviceGet(_index(device)))
    return int(_checked("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(attribute, handle)))


def _index(device: torch.device) -> int:
    from ..ops.device import indexed

    return int(indexed(device).index)


def _capability(device: torch.device) -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(_index(device))
    return major * 10 + minor


def _compiler_log(program: Any) -> str:
    from cuda.bindings import nvrtc

    log = bytearray(_checked("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program)))
    _checked("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, log))
    return log.decode(errors="replace").rstrip("\0\n")


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """The value of a binding's (status, value...) tuple.

    Raises:
        CudaError: the status is not success.
    """
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"{call} failed: {status.name} ({int(status)})")
    return values[0] if len(values) == 1 else None
