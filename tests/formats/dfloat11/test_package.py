"""A folder of ours in the hands of the `dfloat11` package itself: its loader, its hooks and its kernel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from lowmem_bagel.converters.engine.registry import convert_folder
from support.dfloat11_groups import own_groups
from support.paths import CHECKPOINT
from torch import nn

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table

NEEDED = ("dfloat11", "cupy", "dahuffman", "pkg_resources")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


def skeleton(folder: ModelFolder) -> nn.Module:
    """Modules under the checkpoint's names, as the package wants to find them; their weights are zero."""
    root = nn.Module()
    names = set(tensor_table(folder.config))
    for group in own_groups(tensor_table(folder.config).values()):
        weight = folder.tensor(group.weights[0])
        *parents, name = group.module.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        rows, columns = weight.shape
        leaf = (
            nn.Embedding(rows, columns)
            if name == "embed_tokens"
            else nn.Linear(columns, rows, bias=f"{group.module}.bias" in names)
        )
        module.add_module(name, leaf.to(torch.bfloat16))
    return root


@pytest.mark.gpu
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_the_package_loads_our_folder(tmp_path: Path) -> None:
    from dfloat11 import DFloat11Model

    convert_folder(CHECKPOINT, tmp_path / "variant", "dfloat11")
    source = ModelFolder.open(CHECKPOINT)
    model = DFloat11Model.from_pretrained(str(tmp_path / "variant"), device="cuda", bfloat16_model=skeleton(source))
    compared = 0
    with torch.inference_mode():
        for group in own_groups(tensor_table(source.config).values()):
            module, wanted = model.get_submodule(group.module), source.tensor(group.weights[0])
            assert not hasattr(module, "weight"), f"{group.module} was not replaced"
            given = (
                torch.zeros(1, dtype=torch.long)
                if isinstance(module, nn.Embedding)
                else torch.zeros(1, wanted.shape[1]).bfloat16()
            )
            module(given.to("cuda"))
            assert torch.equal(module.weight.cpu().view(torch.int16), wanted.view(torch.int16)), group.module
            compared += 1
    assert compared > 40
