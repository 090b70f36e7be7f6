"""Carries out a plan: checks every tensor's name and shape, builds on the meta device, fills in the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import AttentionBackend, select_backend
from .errors import CheckpointError
from .folder import ModelFolder
from .model.bagel import Bagel
from .model.blob import Layout, named_tensors, set_tensor, stack
from .model.decoder import ExpertLayer
from .model.linear import Linear
from .model.names import FUSED, bagel_tensors, expert_vectors, linear_module
from .model.vae import Vae
from .plan import Plan
from .quant.stored import DenseLinears, StoredLinears
from .tensors import LATENT_POSITIONS, VIT_POSITIONS, Expert, TensorSpec, tensor_table
from .tokenizer import BagelTokenizer

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class LoadedModel:
    """Everything a pipeline runs on. `vae` is None where the plan's tasks need no pictures out."""

    folder: ModelFolder
    plan: Plan
    bagel: Bagel
    vae: Vae | None
    tokenizer: BagelTokenizer
    attention: AttentionBackend


def load(folder: ModelFolder, plan: Plan, progress: Progress | None = None) -> LoadedModel:
    """Load a folder as planned.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen.
        SettingError: the plan forces an attention backend that cannot run here.
    """
    check_tensors(folder)
    device = torch.device(plan.device)
    dtype: torch.dtype = getattr(torch, plan.dtype)
    config = folder.config
    linears: StoredLinears = DenseLinears(dtype)
    tokenizer = BagelTokenizer(folder.path)
    decoder = config.decoder
    attention = select_backend(
        plan.attention,
        device=device,
        dtype=dtype,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
    ).backend
    meter = _Meter(folder, progress)

    def factory(layer: int, expert: Expert, name: str, in_features: int, out_features: int) -> Linear:
        modules = [linear_module(layer, expert, short) for short in FUSED[name]]
        return linears.build(modules, in_features, out_features, bias=name == "qkv")

    with torch.device("meta"):
        bagel = Bagel(
            config,
            factory,
            DenseLinears(dtype).build(["lm_head"], config.decoder.hidden_size, config.decoder.vocab_size, bias=False),
            dtype,
            getattr(torch, plan.residual_dtype),
            latent_positions=_table_rows(folder, LATENT_POSITIONS),
            vit_positions=_table_rows(folder, VIT_POSITIONS),
        )
        vae = Vae(config.vae).to(getattr(torch, plan.vae_dtype))
    for layer in range(config.decoder.num_layers):
        for expert, module in bagel.decoder.layers.acquire(layer).items():
            _fill_blob(module, _layer_sources(layer, expert, linears), device, meter.read)
    _fill_tensors(bagel, bagel_tensors(config), device, meter.read)
    _fill_tensors(vae, {path: (path,) for path, _ in named_tensors(vae)}, device, meter.read)
    for model in (bagel, vae):
        model.eval().requires_grad_(False)
        assert not any(t.is_meta for _, t in named_tensors(model))
    return LoadedModel(folder, plan, bagel, vae, tokenizer, attention)


def check_tensors(folder: ModelFolder) -> None:
    """Compare a source checkpoint's tensors with what its configuration demands.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected or misshapen.
    """
    table = tensor_table(folder.config)
    for name, spec in table.items():
        if name not in folder.stored:
            raise CheckpointError(f"{folder.path}: tensor {name} is missing; download the checkpoint again")
        _check_shape(folder, spec)
    for name in folder.stored:
        if name not in table:
            raise CheckpointError(
                f"{folder.path}: unexpected tensor {name}; the checkpoint does not belong to its configuration"
            )


def _check_shape(folder: ModelFolder, spec: TensorSpec) -> None:
    entry = folder.entry(spec.name)
    wanted = tuple(found if size is None else size for size, found in zip(spec.shape, entry.shape, strict=False))
    if len(spec.shape) != len(entry.shape) or wanted != entry.shape:
        shape = " x ".join("any" if size is None else str(size) for size in spec.shape)
        raise CheckpointError(
            f"{folder.path}: tensor {spec.name} is {' x '.join(map(str, entry.shape))}, and the configuration "
            f"demands {shape}; the checkpoint does not belong to its configuration"
        )
    if entry.dtype not in ("BF16", "F16", "F32"):
        raise CheckpointError(f"{folder.path}: tensor {spec.name} is {entry.dtype}; a checkpoint holds BF16, F16 or F32")


def _table_rows(folder: ModelFolder, name: str) -> int:
    rows = folder.entry(name).shape[0]
    if math.isqrt(rows) ** 2 != rows or not rows:
        raise CheckpointError(f"{folder.path}: tensor {name} has {rows} rows; a position table is a square")
    return rows


def _layer_sources(layer: int, expert: Expert, linears: StoredLinears) -> dict[str, tuple[str, ...]]:
    sources = expert_vectors(layer, expert)
    for fused, shorts in FUSED.items():
        modules = [linear_module(layer, expert, short) for short in shorts]
        sources |= {f"{fused}.{path}": names for path, names in linears.sources(modules).items()}
    return sources


def _fill_blob(
    module: ExpertLayer, sources: Mapping[str, tuple[str, ...]], device: torch.device, read: Callable[[str], Tensor]
) -> None:
    layout = Layout.of(module)
    blob = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    layout.fill(blob, sources, read)
    layout.bind(module, blob)


def _fill_tensors(
    module: nn.Module, sources: Mapping[str, tuple[str, ...]], device: torch.device, read: Callable[[str], Tensor]
) -> None:
    for path, names in sources.items():
        meta = module.get_parameter(path)
        value = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        stack(value, [read(name) for name in names])
        set_tensor(module, path, value)


class _Meter:
    """Reads tensors and reports the bytes."""

    def __init__(self, folder: ModelFolder, progress: Progress | None) -> None:
        self.folder, self.progress = folder, progress
        self.total = sum(stored.entry.nbytes for stored in folder.stored.values())
        self.done = 0

    def read(self, name: str) -> Tensor:
        self.done += self.folder.entry(name).nbytes
        if self.progress:
            self.progress(self.done, self.total)
        return self.folder.tensor(name)
