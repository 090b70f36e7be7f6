"""Structures that kernels take are written down twice, in CUDA C++ and in ctypes: both must say the same.

A field in another place would be read as another one's value, and nothing would notice but the pictures.
"""

from __future__ import annotations

import ctypes
import re
from itertools import chain
from pathlib import Path

import pytest

import lowmem_bagel
from lowmem_bagel.formats.dfloat11 import kernels as dfloat11
from lowmem_bagel.formats.int8.pairs import TensorMap
from lowmem_bagel.formats.nf4.packed import Levels
from lowmem_bagel.kernels import decode_attention_cuda, elementwise_cuda, nvrtc

PACKAGE = Path(lowmem_bagel.__file__).parent
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.cu"))

MIRRORED: dict[tuple[str, str], type[ctypes.Structure]] = {
    ("kernels/prologues.cu", "Input"): elementwise_cuda._Input,
    ("kernels/epilogues.cu", "Product"): elementwise_cuda._Product,
    ("kernels/epilogues.cu", "Heads"): elementwise_cuda._Heads,
    ("formats/nf4/packed.cu", "Levels"): Levels,
    ("formats/int8/clusters.cu", "TensorMap"): TensorMap,
    ("kernels/attend_token.cu", "Token"): decode_attention_cuda._Token,
}
NUMBERS = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "int": ctypes.c_int32, "float": ctypes.c_float}
Fields = list[tuple[str, type]]


def declared(text: str, struct: str) -> Fields:
    """The fields of a struct in CUDA C++, with the types that ctypes has for them."""
    (body,) = re.findall(rf"^struct (?:alignas\(\d+\) )?{struct} {{$(.*?)^}};$", text, flags=re.MULTILINE | re.DOTALL)
    fields: Fields = []
    for line in re.sub(r"//.*", "", body).split(";")[:-1]:
        found = re.fullmatch(r"\s*(?:const )?(\w+)(\*?) ([\w, ]+?)(?:\[(\d+)\])?\s*", line)
        assert found, f"{struct}: {line!r}"
        kind, pointer, names, size = found.groups()
        of: type = ctypes.c_uint64 if pointer else NUMBERS[kind]
        fields += [(name, of * int(size) if size else of) for name in names.split(", ")]
    return fields


def mirrored(structure: type[ctypes.Structure]) -> Fields:
    return [(name, of) for name, of in structure._fields_]


def taken_by_value(text: str) -> set[str]:
    """Structs of a source that its kernels take as an argument."""
    parameters = re.findall(r'extern "C" __global__ void (?:__\w+__\(.*\)\s)?\w+\(([^)]*)\)', text)
    each = chain(*(p.replace("const __grid_constant__ ", "").split(",") for p in parameters))
    kinds = {parameter.split()[0] for parameter in each}
    return kinds & set(re.findall(r"^struct (?:alignas\(\d+\) )?(\w+) {", text, flags=re.MULTILINE))


@pytest.mark.parametrize(("source", "struct"), MIRRORED)
def test_a_structure_has_the_fields_of_the_cuda_source(source: str, struct: str) -> None:
    assert mirrored(MIRRORED[source, struct]) == declared(nvrtc.source_text(source), struct)


def test_groups_of_dfloat11_have_the_fields_of_the_cuda_source() -> None:
    """They are a table of whole numbers of 64 bits, a row a group."""
    wanted = [(name, ctypes.c_uint64) for name in dfloat11._DESCRIPTOR]
    assert declared(nvrtc.source_text(dfloat11.SOURCE), "Group") == wanted


@pytest.mark.parametrize("source", SOURCES)
def test_what_kernels_take_by_value_is_mirrored(source: str) -> None:
    assert taken_by_value(nvrtc.source_text(source)) == {struct for of, struct in MIRRORED if of == source}


def test_every_structure_of_the_package_mirrors_one() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    named = re.findall(r"^class (\w+)\((?:ctypes\.)?Structure\):", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(structure.__name__ for structure in MIRRORED.values())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    u32 width;\n    u32 type;\n", "    u32 type;\n    u32 width;\n"),
        ("    u64 stride; ", "    u32 stride; "),
        ("    u32 type;\n", ""),
        ("    float eps;\n", "    float eps, more;\n"),
        ("    const void* x;\n", "    const void* y;\n"),
    ],
    ids=["order", "type", "gone", "more", "name"],
)
def test_a_change_of_the_source_alone_is_seen(old: str, new: str) -> None:
    text = nvrtc.source_text("kernels/prologues.cu")
    assert text.count(old) == 1
    assert declared(text.replace(old, new), "Input") != mirrored(elementwise_cuda._Input)
