"""What a weight format declares: the tensors that it stores, and the ways to multiply by them. No torch.

A format is one folder with a `spec.py`, and one line in `registry.FORMATS`. The planner and the loader read the same
list of ways: the planner takes the first that a machine's profile does not rule out, the loader the first that the
device does not rule out and whose trial passes, and says why it passed others over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..checkpoint.safetensors_file import DTYPE_BYTES
from ..checkpoint.tensors import EMBEDDING, LM_HEAD, TensorSpec

if TYPE_CHECKING:
    from ..checkpoint.folder import ModelFolder

Shape = tuple[int, ...]

Around = Literal["triton", "cuda", "torch"]
"""What computes what surrounds the products: Triton's kernels, CUDA kernels that NVRTC compiles, PyTorch's own."""

TENSOR_CORES = (8, 0)
"""Capability from which Triton's matmuls use tensor cores; before, they are slower than PyTorch's."""
INT8_DOT_PRODUCTS = ((6, 1), (7, 5))
"""Capabilities before that one with int8 products."""


@dataclass(frozen=True)
class Part:
    """One tensor that an encoded weight of shape [out, in] is stored in.

    path: its name in the linear. suffix: what its stored name has behind the weight's. dtype: safetensors' name, or a
    type of GGUF's blocks, which are bytes.
    """

    path: str
    suffix: str
    dtype: str
    shape: Callable[[Shape], Shape]

    def nbytes(self, weight: Shape) -> int:
        return math.prod(self.shape(weight)) * DTYPE_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class ConvertOption:
    """An option of `convert` for one format. kind: "flag", "path", or "text" that is one of `choices`.

    converter: what `--to` calls the format, where that is not the format's own name.
    """

    name: str
    help: str
    kind: Literal["flag", "path", "text"] = "flag"
    choices: tuple[str, ...] = ()
    converter: str = ""


@dataclass(frozen=True)
class Environment:
    """What ways are chosen by: of a machine's profile when a plan is made, of the device itself when it is loaded.

    device: "cpu" or "cuda". dtype: of the arithmetic. capability: (0, 0) without a card. missing: feature -> why it is
    not there; what is not named is there, as far as is known.
    """

    device: str
    dtype: str
    capability: tuple[int, int] = (0, 0)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def around(self) -> Around:
        """What surrounds the products here."""
        if self.device == "cpu" or self.dtype == "float32":
            return "torch"
        if self.dtype == "bfloat16" and BY_TRITON.unmet(self) is None:
            return "triton"
        return "torch" if "nvrtc" in self.missing else "cuda"


@dataclass(frozen=True)
class Requires:
    """What a way needs; what is not named does not matter. `capabilities` are such that do beside `capability`."""

    device: str | None = None
    dtypes: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)
    capabilities: tuple[tuple[int, int], ...] = ()
    major: int | None = None
    features: tuple[str, ...] = ()

    def unmet(self, here: Environment) -> str | None:
        """None where all of it is there, else what is not, in words."""
        if self.device not in (None, here.device):
            return "needs a CUDA GPU" if self.device == "cuda" else f"is for a {self.device}"
        if self.dtypes and here.dtype not in self.dtypes:
            return f"does not compute in {here.dtype}"
        have = here.capability
        if have < self.capability and have not in self.capabilities:
            return f"needs compute capability {_dotted(self.capability)}; this card has {_dotted(have)}"
        if self.major not in (None, have[0]):
            return f"is for compute capability {self.major}.x; this card has {_dotted(have)}"
        return next((here.missing[feature] for feature in self.features if feature in here.missing), None)


BY_TRITON = Requires(device="cuda", capability=TENSOR_CORES, features=("triton",))


@dataclass(frozen=True)
class Way:
    """One way to multiply by a format's weights.

    What it is:
        name: unique in its format. make: "module:function" that makes it at loading (see `formats.base.Site`), raising
        `Refused` where a trial fails. backend: what `backend=` calls it. by_name: never chosen unless asked for.
        says: the reason in a plan; "{why}" in it is what ruled the ways before it out. package: what must be installed
        for the backend, as (module, name on the package index).
    What it costs, for the planner:
        products: which nominal rate of a card its matmuls have; share: the calibration's constant for how much of it;
        by_major: (major compute capability, constant) of cards where kernels made for them reach another.
        weights: multiplied as they are stored; decoded at every use, or while loading; or made dense at every use.
        adds: the residual is added to in place where kernels of ours surround the product.
        mlp: what the MLP's activations are beside dense ones: int8 values, or an int32 product.
        scratch: bytes beside the largest weight that a way which makes weights dense needs.
    """

    name: str
    make: str
    backend: str = "native"
    requires: Requires = field(default_factory=Requires)
    says: str = ""
    by_name: bool = False
    products: Literal["dense", "int8"] = "dense"
    share: str = "linear_share"
    by_major: tuple[tuple[int, str], ...] = ()
    weights: Literal["stored", "decoded at use", "decoded at load", "dequantized"] = "stored"
    adds: bool = False
    mlp: Literal["dense", "int8 values", "int32 product"] = "dense"
    scratch: int = 0
    swiglu_in_matmul: bool = False
    package: tuple[str, str] | None = None

    @property
    def by_triton(self) -> bool:
        return "triton" in self.requires.features

    def share_on(self, capability: tuple[int, int]) -> str:
        return dict(self.by_major).get(capability[0], self.share)


@dataclass(frozen=True)
class Layout:
    """How a folder without a manifest stores encoded weights, where single tensors do not say so.

    stored: weight -> the names of its tensors. missing: features of `Environment` that the folder rules out, and why.
    """

    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def no_layout(folder: ModelFolder) -> Layout:
    """Every tensor lies under its own name."""
    return Layout()


def decoder_linears(spec: TensorSpec) -> bool:
    """The weights that a format encodes unless it says otherwise."""
    return spec.linear is not None


def linears_and_embeddings(spec: TensorSpec) -> bool:
    return spec.linear is not None or spec.name in (EMBEDDING, LM_HEAD)


@dataclass(frozen=True)
class FormatSpec:
    """A weight format.

    name: in `variant.json`, in `--to` and in plans. title: in sentences. lossless: stored values have the checkpoint's
    bits. parts: of an encoded weight; none where weights are stored as plain floats. bits: a weight's size where parts
    do not tell it, as codes of changing length. ways: the preferred one first. encodes: which tensors the format
    encodes. runs_head: an encoded lm_head is multiplied as it is stored. layout: of folders without a manifest.
    """

    name: str
    title: str
    lossless: bool
    ways: tuple[Way, ...]
    parts: tuple[Part, ...] = ()
    bits: float = 0.0
    encodes: Callable[[TensorSpec], bool] = decoder_linears
    runs_head: bool = False
    layout: Callable[[ModelFolder], Layout] = no_layout
    not_on_device: tuple[str, ...] = ()
    """Last parts of stored names that stay on the host."""
    options: tuple[ConvertOption, ...] = ()
    family: str = ""
    """What the names of formats begin with that may stand side by side in a folder."""
    trials: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The format's kernels for `doctor`: name -> "module:name" of a `kernels.trials.Kernel`, or of a function of a
    `kernels.cuda_source.CudaSource` that gives None or the reason."""
    tuned: str = ""
    """"module:name" of a function that says for `doctor` what was measured on a device: (device) -> lines by name."""

    @property
    def encoded(self) -> bool:
        """Whether weights are stored as something other than floats."""
        return bool(self.parts or self.bits)

    @property
    def inexact(self) -> bool:
        """Whether weights are stored as codes that are not the checkpoint's values, whatever the arithmetic."""
        return self.encoded and not self.lossless

    def holds(self, encoding: str) -> bool:
        """Whether a weight that is encoded so may be in a folder of this format."""
        return encoding == self.name or (bool(self.family) and encoding.startswith(f"{self.family}-"))

    def nbytes(self, weight: Shape) -> int:
        """Bytes that an encoded weight takes, or about so many."""
        if self.bits:
            return int(math.prod(weight) * self.bits / 8)
        return sum(part.nbytes(weight) for part in self.parts)

    @property
    def backends(self) -> tuple[str, ...]:
        """What `backend=` may name, the preferred one first."""
        return tuple(dict.fromkeys(way.backend for way in self.ways))

    def ways_by(self, backend: str) -> Iterator[Way]:
        """The ways that a backend, or "auto", leaves to choose from."""
        return (way for way in self.ways if way.backend == backend or (backend == "auto" and not way.by_name))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
