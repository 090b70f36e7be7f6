"""The decoder's linears in the fixed-length lossless form, made while a bf16 or DFloat11 folder is loaded.

Few tokens read the form directly, which is less to read than bf16; many decode it first. How large a weight becomes
is known only once it is encoded, so a linear gets its tensors from `encode`, before memory is laid out for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..folder import ModelFolder
from ..kernels import fixed_length_packed
from ..kernels.fixed_length import MAX_TOKENS, FixedLengthKernels
from ..kernels.fixed_length_packed import PACKED_TENSORS, Packed
from ..model.linear import DenseLinear, Linear, joined
from ..tensors import LM_HEAD, tensor_table

if TYPE_CHECKING:
    from .dfloat11_linear import Scratch
    from .stored import StoredLinears


class FixedLengthLinear(Linear):
    """A bf16 linear kept in the fixed-length form: few tokens read it directly, for many it is decoded first.

    `scratch`, into which kernels decode, is bf16, contiguous and at least as large as the weight; linears that run one
    after another share it. Without kernels everything is done by torch operations.
    """

    def __init__(
        self, packed: Packed, bias: Tensor | None, kernels: FixedLengthKernels | None, scratch: Tensor
    ) -> None:
        super().__init__(packed.cols, packed.rows)
        for name in PACKED_TENSORS:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self._kernels = kernels
        self._scratch = (scratch,)  # in a tuple: not a tensor of this module
        self._fuses = self.fills_the_card = kernels is not None and kernels.fuses(torch.bfloat16)

    @property
    def packed(self) -> Packed:
        """The weight, from the tensors that the module has now."""
        return Packed(self.out_features, self.in_features, **{name: getattr(self, name) for name in PACKED_TENSORS})

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x) if self._reads(x) else self._decoded(x)(x)

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self._reads(x):
            return self._multiply(x, norm=(weight, eps))
        return self._decoded(x).after_rmsnorm(x, weight, eps)

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        if self._reads(gate_up):
            return self._multiply(gate_up, gated=True)
        return self._decoded(gate_up).after_swiglu(gate_up)

    def activates(self, tokens: int) -> bool:
        return self._fuses and tokens == 1

    def activated(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self._reads(x):
            return self._multiply(x, norm=(weight, eps), activated=True)
        return self._decoded(x).activated(x, weight, eps)

    def added(self, residual: Tensor, x: Sequence[Tensor]) -> Tensor:
        if self._reads(residual):
            return self._multiply(joined(x), residual=residual)
        return self._decoded(x[0]).added(residual, x)

    def added_after_swiglu(self, residual: Tensor, gate_up: Tensor) -> Tensor:
        if self._reads(residual):
            return self._multiply(gate_up, gated=True, residual=residual)
        return self._decoded(gate_up).added_after_swiglu(residual, gate_up)

    def _reads(self, x: Tensor) -> bool:
        """Whether tokens like these read the form directly."""
        return self._kernels is not None and x.numel() <= MAX_TOKENS * x.shape[-1]

    def _multiply(self, x: Tensor, **around: Any) -> Tensor:
        assert self._kernels is not None
        return self._kernels.matmul(self.packed, x, cast("Tensor | None", self.bias), **around)

    def _decoded(self, x: Tensor) -> Linear:
        """A linear of the dtype of `x` with the decoded weight."""
        if self._kernels is None:
            weight = fixed_length_packed.decode_reference(self.packed)
        else:
            weight = self._scratch[0].view(-1)[: self.out_features * self.in_features]
            weight = weight.view(self.out_features, self.in_features)
            self._kernels.decode_into(self.packed, weight)
        dense = DenseLinear(0, 0, bias=False, dtype=x.dtype)
        dense.in_features, dense.out_features = self.in_features, self.out_features
        dense.weight = nn.Parameter(weight.to(x.dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(cast("Tensor", self.bias), requires_grad=False)
        return dense


class EncodedAtLoad(FixedLengthLinear):
    """A linear that is empty until `encode` is called, once, before anything else.

    Where kernels decode it for many tokens, `dense`, the linear that would hold the weight itself, multiplies: with
    what it fuses, and to its very bits.
    """

    def __init__(self, owner: FixedLengthLinears, modules: Sequence[str], dense: Linear, bias: bool) -> None:
        in_features, out_features = dense.in_features, dense.out_features
        Linear.__init__(self, in_features, out_features)
        for name in PACKED_TENSORS:
            self.register_buffer(name, None)
        self.register_buffer("bias", torch.empty(out_features, dtype=owner.dtype) if bias else None)
        self._kernels = owner.kernels
        self._fuses = self.fills_the_card = owner.kernels is not None and owner.kernels.fuses(owner.dtype)
        self._owner, self._modules_stacked = owner, tuple(modules)
        self._dense = (dense,)  # in a tuple: its weight, which is scratch, is not one of this module's tensors
        owner.scratch.reserve(in_features * out_features)

    def encode(self) -> None:
        """Read and encode the weight; its tensors are on the owner's device."""
        for name, tensor in self._owner.encode(self._modules_stacked).items():
            self._buffers[name] = tensor
        scratch = self._owner.scratch.view(self.out_features, self.in_features)
        self._scratch = (scratch,)
        self._dense[0]._parameters["weight"] = nn.Parameter(scratch, requires_grad=False)

    def _decoded(self, x: Tensor) -> Linear:
        if self._kernels is None or self._owner.dtype != torch.bfloat16:
            return super()._decoded(x)
        (dense,), (scratch,) = self._dense, self._scratch
        self._kernels.decode_into(self.packed, scratch)
        dense._parameters["bias"] = cast("nn.Parameter | None", self.bias)
        return dense


class FixedLengthLinears:
    """Weights of another way of storing them, `base`, encoded while they are read; see `stored.StoredLinears`.

    Args:
        kernels: None where all is done by torch operations.
        scratch: bf16, shared by all linears.
    """

    def __init__(
        self,
        folder: ModelFolder,
        base: StoredLinears,
        dtype: torch.dtype,
        kernels: FixedLengthKernels | None,
        scratch: Scratch,
    ) -> None:
        self.folder, self.base, self.dtype = folder, base, dtype
        self.kernels, self.scratch = kernels, scratch
        self.name = "fixed-length lossless" + ("" if kernels else " (by torch operations)")
        self._encoded: dict[str, Tensor] = {}

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        dense = self.base.build(modules, in_features, out_features, bias)
        if modules == [LM_HEAD.removesuffix(".weight")]:
            return dense
        return EncodedAtLoad(self, modules, dense, bias)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        if modules == [LM_HEAD.removesuffix(".weight")]:
            return self.base.sources(modules)
        return {name: (_encoded_name(modules, name),) for name in PACKED_TENSORS}

    def stored(self, name: str) -> tuple[str, ...]:
        return self.base.stored(name)

    def read(self, name: str) -> Tensor | None:
        """An encoded tensor, once: it is let go of; or what `base` reads."""
        return self._encoded.pop(name) if name in self._encoded else self.base.read(name)

    def encode(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of the modules' weights stacked by rows, which `read` then gives by their names in `sources`."""
        parts = []
        for module in modules:
            decoded = self.base.read(f"{module}.weight")
            part = self.folder.tensor(f"{module}.weight") if decoded is None else decoded
            parts.append(part.to(self.scratch.device))
        packed = fixed_length_packed.encode(torch.cat(parts))
        tensors: dict[str, Tensor] = {name: getattr(packed, name) for name in PACKED_TENSORS}
        self._encoded.update({_encoded_name(modules, name): tensor for name, tensor in tensors.items()})
        return tensors


def _encoded_name(modules: Sequence[str], tensor: str) -> str:
    """What stands for a stored tensor's name: no file has it."""
    return f"{modules[0]}.fixed_length.{tensor}"


def fixed_length_linears(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, base: StoredLinears, reasons: dict[str, str]
) -> FixedLengthLinears | None:
    """The form on top of `base`, whose `read` and the folder give bf16 weights; None where it cannot be.

    `reasons` gets why not, or why the kernels are not used.
    """
    from .dfloat11_linear import Scratch

    why = _why_not(folder, dtype)
    if why is not None:
        reasons["fixed-length form"] = why
        return None
    kernels = _kernels(device)
    if isinstance(kernels, str):
        reasons["fixed-length kernels"] = kernels
        if device.type == "cuda":
            return None  # decoding by torch operations at every use would be slower than anything else there
    scratch = Scratch(device, torch.bfloat16)
    return FixedLengthLinears(folder, base, dtype, None if isinstance(kernels, str) else kernels, scratch)


def _why_not(folder: ModelFolder, dtype: torch.dtype) -> str | None:
    if dtype == torch.float16:
        return "fp16 arithmetic scales its weights"
    for name, spec in tensor_table(folder.config).items():
        if spec.linear is not None and name in folder.stored and folder.entry(name).dtype != "BF16":
            return f"{name} is stored as {folder.entry(name).dtype}, not BF16"
    return None


def _kernels(device: torch.device) -> FixedLengthKernels | str:
    """The kernels, tried on a small weight against their reference, or why they cannot be used."""
    from ..kernels import nvrtc

    why = nvrtc.why_unavailable(device)
    if why is not None:
        return why
    try:
        kernels = FixedLengthKernels(device)
        weight = torch.randn(40, 520, device=device).bfloat16()
        x = torch.randn(2, 520, device=device).bfloat16()
        packed = fixed_length_packed.encode(weight)
        decoded = torch.empty_like(weight)
        kernels.decode_into(packed, decoded)
        found, wanted = kernels.matmul(packed, x).double(), x.double() @ weight.double().T
    except RuntimeError as error:  # compilers and drivers fail in their own ways, and each is a reason
        return f"their trial failed ({str(error).strip().splitlines()[0]})"
    if not torch.equal(decoded, weight) or not (found - wanted).norm() <= 1e-2 * wanted.norm():
        return "their trial gave a wrong result"
    return kernels
