"""Which weights a DFloat11 file's groups hold: the published checkpoint's, a layer a group, and our converter's."""

from __future__ import annotations

from collections.abc import Iterable

from lowmem_bagel.checkpoint.tensors import EMBEDDING, LM_HEAD, TensorSpec
from lowmem_bagel.formats.dfloat11.groups import Group

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
GEN = [name + "_moe_gen" if "attn" in name else name.replace("mlp", "mlp_moe_gen") for name in LINEARS]
PUBLISHED = {
    r"language_model\.model\.embed_tokens": [],
    r"language_model\.model\.layers\.\d+": LINEARS + GEN,
    r"language_model\.lm_head": [],
}


def own_groups(specs: Iterable[TensorSpec]) -> list[Group]:
    """One group for each weight that the converter compresses, in the order of the tensor table."""
    return [
        Group(spec.name.removesuffix(".weight"), (spec.name,))
        for spec in specs
        if spec.linear is not None or spec.name in (EMBEDDING, LM_HEAD)
    ]
