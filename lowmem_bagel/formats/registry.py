"""How a folder stores the decoder's linears and which linear runs them: the seam between formats and the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..checkpoint.folder import ModelFolder
from ..checkpoint.tensors import EMBEDDING
from ..errors import CheckpointError, SettingError
from ..ops.dtypes import wide
from ..ops.linear import Linear
from .base import DenseLinears, Dequantized, QuantMatmul, StoredLinears
from .bf16.stepped import SteppedDenseLinear, SteppedNf4
from .scaled_matmul import (
    Fp16Weights,
    Int8AsFp16,
    Int8Products,
    Nf4AsFp16,
    ScaledFp16Linear,
    TokenSteps,
    choose_matmul,
)

BACKENDS: dict[str, tuple[str, ...]] = {
    "source": ("native",),
    "fp16": ("native",),
    "int8": ("native", "bitsandbytes", "quanto"),
    "nf4": ("native", "bitsandbytes"),
    "dfloat11": ("native", "dfloat11", "cpu"),
}
"""Which backends can run a folder's format, the preferred one first. "cpu" for DFloat11 decodes at load."""


class QuantisedLinears:
    """INT8 or NF4 weights, multiplied by a `QuantMatmul`; a rotated tensor's inputs are rotated alike."""

    def __init__(self, folder: ModelFolder, dense: DenseLinears, matmul: QuantMatmul, name: str) -> None:
        assert folder.manifest is not None
        self.dense, self.matmul, self.name = dense, matmul, name
        self.folder, self.records = folder, folder.manifest.tensors

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        from .int8.codec import Int8Linear
        from .nf4.codec import Nf4Linear

        encoding = self._shared(modules, "encoding", [self.records[f"{m}.weight"].encoding for m in modules])
        if encoding == "int8":
            return Int8Linear(in_features, out_features, bias, wide(self.dense.dtype), self._matmul(modules))
        if encoding == "nf4":
            return Nf4Linear(in_features, out_features, bias, wide(self.dense.dtype), self.matmul)
        return self.dense.build(modules, in_features, out_features, bias)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        record = self.records[f"{modules[0]}.weight"]
        suffixes = {"int8": {"scale": "_scale"}, "nf4": {"absmax": "_absmax"}}.get(record.encoding, {})
        names = tuple(f"{module}.weight" for module in modules)
        return {"weight": names} | {path: tuple(n + suffix for n in names) for path, suffix in suffixes.items()}

    def stored(self, name: str) -> tuple[str, ...]:
        return (name,)

    def read(self, name: str) -> Tensor | None:
        """The embedding is looked up in and not multiplied by, so where it is INT8 it is dequantised at load."""
        from .int8.codec import dequantize

        if name != EMBEDDING or self.records[name].encoding != "int8":
            return None
        weight, scale = self.folder.tensor(name), self.folder.tensor(f"{name}_scale")
        return dequantize(weight, scale, wide(self.dense.dtype))

    def _matmul(self, modules: Sequence[str]) -> QuantMatmul:
        from .int8.rotation import Rotated, Rotation

        groups = [self.records[f"{m}.weight"].options.get("rotation_group", 0) for m in modules]
        group = int(self._shared(modules, "rotation_group", groups))
        return Rotated(self.matmul, Rotation(group)) if group else self.matmul

    def _shared(self, modules: Sequence[str], what: str, values: Sequence[object]) -> str:
        if len(set(values)) != 1:
            raise CheckpointError(f"{', '.join(modules)}: differ in their {what}; convert the folder again")
        return str(values[0])


def stored_linears(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    reasons: dict[str, str],
    steps: TokenSteps | None = None,
) -> StoredLinears:
    """The way to run a folder's linears on a device.

    Args:
        backend: "auto" or one of `BACKENDS` for the folder's format. INT8 on a CPU: "auto" times integers against
            dequantised weights, "native" is integers without a trial.
        reasons: gets why each preferred way was refused.
        steps: what surrounds the matmuls; None: PyTorch's operations, or Triton's kernels.

    Raises:
        SettingError: the backend cannot run this format.
        MissingExtraError: the backend's package is not installed.
    """
    able = BACKENDS.get(folder.format)
    if able is None:
        raise CheckpointError(f"{folder.path}: unknown format {folder.format!r}; update lowmem-bagel")
    if backend not in ("auto", *able):
        raise SettingError(f"backend {backend!r} cannot run {folder.format}; choose auto or one of {', '.join(able)}")
    dense = _dense(device, dtype, reasons, steps)
    if folder.format in ("source", "fp16"):
        return dense
    if folder.format == "dfloat11":
        from .dfloat11.linear import dfloat11_linears

        return dfloat11_linears(folder, device, dtype, backend, dense, reasons)
    matmul, name = _quant_matmul(folder.format, device, dtype, backend, reasons, steps)
    return QuantisedLinears(folder, dense, matmul, name)


def _dense(device: torch.device, dtype: torch.dtype, reasons: dict[str, str], steps: TokenSteps | None) -> DenseLinears:
    if dtype == torch.float16:
        matmul = Fp16Weights(choose_matmul(device), steps)
        if matmul.way.reason:
            reasons["fp16 matmul"] = matmul.way.reason

        def scaled(in_features: int, out_features: int, bias: bool, _: torch.dtype) -> Linear:
            return ScaledFp16Linear(in_features, out_features, bias, matmul)

        return DenseLinears(dtype, scaled, f"dense ({matmul.way.name})")
    if device.type == "cuda":
        from ..kernels.trials import why_not

        missing = next((why for why in (why_not(name, device) for name in ("fused", "gemv")) if why), None)
        if missing is None:
            from .bf16.linear import TritonDenseLinear

            why = why_not("swiglu_matmul", device)
            if why is not None:
                reasons["SwiGLU in the matmul"] = why
            elif dtype == torch.bfloat16:
                processors = torch.cuda.get_device_properties(device).multi_processor_count
                return DenseLinears(dtype, partial(TritonDenseLinear, swiglu_processors=processors), "dense (Triton)")
            return DenseLinears(dtype, TritonDenseLinear, "dense (Triton)")
        reasons["Triton kernels"] = missing
        if steps is not None:
            return DenseLinears(dtype, partial(SteppedDenseLinear, steps=steps), f"dense ({steps.name} around it)")
    return DenseLinears(dtype)


def _quant_matmul(
    form: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    reasons: dict[str, str],
    steps: TokenSteps | None,
) -> tuple[QuantMatmul, str]:
    """A way to multiply by INT8 or NF4 weights, and its name."""
    from .int8 import codec as int8
    from .nf4 import codec as nf4

    if backend == "bitsandbytes":
        from .int8.libraries import BitsandbytesInt8

        return (BitsandbytesInt8() if form == "int8" else nf4.BitsandbytesNf4()), f"{form} (bitsandbytes)"
    if backend == "quanto":
        from .int8.libraries import QuantoInt8

        return QuantoInt8(), f"{form} (quanto)"
    if dtype == torch.float16 and form == "nf4":
        return Nf4AsFp16(choose_matmul(device), steps), "nf4 (dequantised to fp16)"
    from ..kernels.trials import choose_int8, choose_nf4

    choice = (choose_int8 if form == "int8" else choose_nf4)(device)
    reasons.update({f"{form} kernel {name}": why for name, why in choice.refused})
    if isinstance(choice.matmul, int8.WeightOnly) and dtype == torch.float16:
        return Int8AsFp16(choose_matmul(device), steps), "int8 (dequantised to fp16)"
    if steps is not None and type(choice.matmul) is Dequantized:
        return SteppedNf4(steps), f"nf4 (dequantised, {steps.name} around it)"
    if type(choice.matmul) is int8.IntMm:
        if steps is not None and steps.reads_packed:
            return Int8Products(steps), f"int8 (IntMm, {steps.name} around it)"
        if device.type == "cpu" and backend == "auto":
            from .int8.cpu_choice import choose_by_trial

            floats = Int8AsFp16(choose_matmul(device)) if dtype == torch.float16 else int8.WeightOnly()
            matmul, why = choose_by_trial(choice.matmul, floats, dtype)
            return matmul, f"{form} ({type(matmul).__name__}; {why})"
    return choice.matmul, f"{form} ({type(choice.matmul).__name__})"
