"""Checkpoints and variants of random numbers at a true shape, in memory or on disk: for measuring without the download.

Quantised numbers are random in the format's own terms (int8 values, NF4 codes); DFloat11 codes one layer's random
weights and uses them for every layer, since the decoder's speed depends on their distribution only.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from tokenizers import Tokenizer

from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.folder import VAE_FILE, ModelFolder
from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES
from lowmem_bagel.checkpoint.manifest import Manifest
from lowmem_bagel.checkpoint.safetensors_file import DTYPE_BYTES, SafetensorsFile, TensorEntry, torch_dtype
from lowmem_bagel.checkpoint.tensors import EXPERTS, TensorSpec, tensor_table
from lowmem_bagel.demo_checkpoint import FOLDER as TOKENIZER_FOLDER
from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats.dfloat11.codec import encode
from lowmem_bagel.formats.dfloat11.groups import COMPONENTS, own_config, stored_name
from lowmem_bagel.formats.gguf.trial import SCALES as PLACES
from lowmem_bagel.formats.gguf.trial import SIZE
from lowmem_bagel.formats.registry import format_spec
from lowmem_bagel.formats.spec import FormatSpec, decoder_linears
from lowmem_bagel.planner.facts import POSITION_SIDES

from .demo.layout import write_configs
from .demo.tokens import special_ids
from .shapes import shape_named

WEIGHT_STD = 0.02
SCALES = {"I8": 3 * WEIGHT_STD / 127, "U8": 2.5 * WEIGHT_STD}
"""Scales by the dtype of what they scale: whole numbers up to 127, or codes of values up to 1."""
MINS = {"Q5_K": 15.5, "Q4_K": 7.5}
"""What mins of any bytes must be beside scales of any bytes, so that values are on average 0."""
LARGE = 100_000_000
"""Values above which a matrix is put together on the host, so that making it takes no memory of a limited card: torch
would keep what it took, and put layers of the model into it, which leaves holes."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

Make = Callable[[], torch.Tensor]
Made = tuple[str, str, tuple[int, ...], Make]
"""A stored tensor: its name, its dtype in safetensors' terms, its shape, and what makes it."""
Encode = Callable[[TensorSpec], Iterable[Made]]
"""What is stored of a decoder linear's weight."""


def shape_of(spec: TensorSpec) -> tuple[int, ...]:
    """A tensor's shape with the position tables at their published sizes."""
    return tuple(POSITION_SIDES[spec.name] ** 2 if size is None else size for size in spec.shape)


def make_tensor(spec: TensorSpec, device: str) -> torch.Tensor:
    """Norm weights near 1, everything else N(0, 0.02); bf16, the VAE fp32, as a checkpoint stores them.

    Convolutions of the VAE are scaled by their width instead, so that pictures stay finite.
    """
    shape = shape_of(spec)
    dtype = torch.float32 if spec.part == "vae" else torch.bfloat16
    if math.prod(shape) > LARGE:
        matrix = torch.empty(shape, dtype=dtype)
        for block in matrix.split(LARGE // shape[-1]):
            block.copy_(torch.empty_like(block, device=device).normal_(0.0, WEIGHT_STD))
        return matrix
    value = torch.empty(shape, dtype=dtype, device=device)
    if "norm" in spec.name and len(shape) == 1 and spec.name.endswith(".weight"):
        return value.normal_(1.0, WEIGHT_STD)
    if len(shape) == 4:
        return value.normal_(0.0, 1 / math.sqrt(math.prod(shape[1:])))
    return value.normal_(0.0, WEIGHT_STD)


def begin_at(seed: int) -> None:
    """`torch.manual_seed`, which without a GPU writes down the whole call stack three times, and that takes longer than
    making a small tensor."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class MadeFile:
    """Stands for a safetensors file: entries by name, tensors made when they are read.

    A tensor's numbers are its name's, whichever thread reads it when: rows of one format have the same weights.
    """

    def __init__(self, made: Iterable[Made]) -> None:
        self.path = Path("synthetic.safetensors")
        self.entries: dict[str, TensorEntry] = {}
        self._make: dict[str, Make] = {}
        self._one_at_a_time = threading.Lock()  # torch has one generator for all threads
        end = 0
        for name, dtype, shape, make in made:
            nbytes = math.prod(shape) * DTYPE_BYTES.get(dtype, 1)  # blocks are bytes
            self.entries[name] = TensorEntry(name, dtype, shape, end, nbytes)
            self._make[name] = make
            end += self.entries[name].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        with self._one_at_a_time:
            begin_at(zlib.crc32(name.encode()))
            return self._make[name]()


def synthetic_folder(format: str, shape: str, device: str) -> ModelFolder:
    """A folder of a format that exists in memory alone. Its tokenizer is the demo checkpoint's.

    Raises:
        SettingError: an unknown shape, or a format whose stored tensors its declaration does not tell.
        CheckpointError: an unknown format.
    """
    config, spec = shape_named(shape), format_spec(format)
    if not spec.parts and format not in ("source", "dfloat11"):
        raise SettingError(f"no random weights in {format}; choose source, or a format whose parts are declared")
    encode = _dfloat11(device) if format == "dfloat11" else partial(_parts, spec, device)
    encodes = decoder_linears if format == "dfloat11" else spec.encodes
    specs = tensor_table(config).values()
    made = {s.name: list(encode(s) if spec.encoded and encodes(s) else _plain(s, device)) for s in specs}
    file = cast(SafetensorsFile, MadeFile(itertools.chain(*made.values())))
    if format == "dfloat11":
        return ModelFolder(_dfloat11_folder(config), config, format, None, [file])
    manifest = _manifest(spec, specs, made) if spec.encoded else None
    return ModelFolder(TOKENIZER_FOLDER, config, format, manifest, [file])


def write_adapter(config: BagelConfig, rank: int, out: Path, seed: int = 0) -> Path:
    """Write a random LoRA adapter, as PEFT does, for every linear of the expert that draws."""
    from safetensors.torch import save_file  # of the extra `benchmarks`

    generator, factors = torch.Generator().manual_seed(seed), {}
    for spec in tensor_table(config).values():
        if decoder_linears(spec) and spec.expert == "gen":
            rows, width = shape_of(spec)
            module = "base_model.model." + spec.name.removesuffix(".weight").removeprefix("language_model.")
            for factor, shape in (("lora_A", (rank, width)), ("lora_B", (rows, rank))):
                values = torch.randn(*shape, generator=generator) * WEIGHT_STD
                factors[f"{module}.{factor}.weight"] = values.bfloat16()
    save_file(factors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return out


def write_checkpoint(config: BagelConfig, out: Path, device: str, seed: int = 0) -> None:
    """Write random weights as a checkpoint in the published layout, a shard a layer (29.6 GB for bagel-7b)."""
    from safetensors.torch import save_file  # of the extra `benchmarks`; models are read without it

    out.mkdir(parents=True)
    torch.manual_seed(seed)
    specs = sorted(tensor_table(config).values(), key=_shard)
    for (vae, layer), shard in itertools.groupby(specs, _shard):
        name = VAE_FILE if vae else f"model-{layer + 1:05}.safetensors"
        save_file({spec.name: make_tensor(spec, device).cpu() for spec in shard}, out / name)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER_FOLDER / name, out / name)
    write_configs(config, out, special_ids(Tokenizer.from_file(str(out / "tokenizer.json"))))


def _shard(spec: TensorSpec) -> tuple[bool, int]:
    """Whether it is the VAE's, and the decoder layer, -1 for what is of none."""
    return spec.part == "vae", -1 if spec.layer is None else spec.layer


def _plain(spec: TensorSpec, device: str) -> Iterator[Made]:
    dtype = "F32" if spec.part == "vae" else "BF16"
    yield spec.name, dtype, shape_of(spec), partial(make_tensor, spec, device)


def _parts(format: FormatSpec, device: str, spec: TensorSpec) -> Iterator[Made]:
    """Random integers, and scales that give weights of about the usual size."""
    for part in format.parts:
        shape, dtype = part.shape(shape_of(spec)), torch_dtype(part.dtype)
        if part.dtype in BLOCK_TYPES:
            yield spec.name, part.dtype, shape, partial(blocks, part.dtype, shape[0], device)
            continue
        make: Make = partial(torch.full, shape, SCALES[format.parts[0].dtype], dtype=dtype, device=device)
        if not dtype.is_floating_point:
            least, most = max(torch.iinfo(dtype).min, -127), torch.iinfo(dtype).max
            make = partial(torch.randint, least, most + 1, shape, dtype=dtype, device=device)
        yield spec.name + part.suffix, part.dtype, shape, make


def blocks(kind: str, nbytes: int, device: str | torch.device) -> torch.Tensor:
    """Any blocks of a GGUF type whose values are of about the usual size and on average 0; uint8 [nbytes]."""
    found = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    pairs = found.view(-1, BLOCK_TYPES[kind].nbytes)
    for place, size in zip(PLACES[kind], (1.0, MINS.get(kind, 0.0)), strict=False):
        pattern = torch.tensor([WEIGHT_STD * SIZE[kind] * size], dtype=torch.float16).view(torch.uint8)
        pairs[:, place : place + 2] = pattern.to(device)
    return found


def _dfloat11(device: str) -> Encode:
    of_shape: dict[tuple[int, ...], Mapping[str, torch.Tensor]] = {}

    def stored(spec: TensorSpec) -> Iterator[Made]:
        shape = shape_of(spec)
        if shape not in of_shape:
            of_shape[shape] = encode([make_tensor(spec, device).cpu()]).tensors
        for component, tensor in of_shape[shape].items():
            name = stored_name(spec.name.removesuffix(".weight"), component)
            yield name, COMPONENTS[component], tuple(tensor.shape), partial(tensor.view, tensor.shape)

    return stored


def _manifest(format: FormatSpec, specs: Iterable[TensorSpec], made: Mapping[str, list[Made]]) -> Manifest:
    """As much of a variant's manifest as loading reads."""
    records = {
        spec.name: SimpleNamespace(
            name=spec.name,
            encoding=format.name if format.encodes(spec) else "bf16",
            stored=tuple(name for name, *_ in made[spec.name]),
            options={},
            errors={},
            shape=shape_of(spec),
        )
        for spec in specs
    }
    return cast(Manifest, SimpleNamespace(format=format.name, experts=EXPERTS, tensors=records, options={}))


def _dfloat11_folder(config: BagelConfig) -> Path:
    """The embedded model's tokenizer beside a `config.json` of the published format."""
    folder = Path(tempfile.mkdtemp(prefix="lowmem-bagel-"))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER_FOLDER / name, folder / name)
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": own_config(config.decoder.routed is not None)}))
    return folder
