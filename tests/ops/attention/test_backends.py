"""Attention backends against float64, their memory, and the choice between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.live_memory import LiveMemory
from torch import Tensor

from lowmem_bagel.diagnostics.probe import try_attention
from lowmem_bagel.errors import SettingError
from lowmem_bagel.kernels import attention_int8, triton_language
from lowmem_bagel.ops.attention import select as attention
from lowmem_bagel.ops.attention.base import AttentionBackend, AttentionRequest, Causal, Unavailable
from lowmem_bagel.ops.attention.chunked import CHUNKED, Chunked, tensor_core_products, upcast_products
from lowmem_bagel.ops.attention.cudnn import Cudnn
from lowmem_bagel.ops.attention.efficient import Efficient
from lowmem_bagel.ops.attention.flash import Flash
from lowmem_bagel.ops.attention.int8 import Int8
from lowmem_bagel.ops.attention.math import COPIES, Plain
from lowmem_bagel.ops.attention.registry import attention_backend, attention_backends, preference
from lowmem_bagel.ops.attention.sdpa import SDPA, Sdpa
from lowmem_bagel.ops.attention.select import reference_attention, select_backend, select_for_part, try_backend
from lowmem_bagel.ops.attention.spec import AttentionSpec, Call
from lowmem_bagel.ops.errors import relative_l2

CPU_BACKENDS = ("sdpa", "chunked", "math")
MADE: dict[str, Callable[[], AttentionBackend]] = {
    "cudnn": lambda: Cudnn(Sdpa()), "flash": Flash, "efficient": Efficient, "chunked": Chunked, "math": Plain,
}  # fmt: skip
"""Those that shapes alone can be put through."""
CUDA_BACKENDS = [*attention_backends()]
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
LOSSY_LIMIT = 2e-2
SHAPES = [
    # batch, queries, keys, heads, key/value heads, head size
    (1, 1, 1, 4, 4, 8),
    (1, 1, 37, 28, 4, 128),
    (1, 5, 5, 28, 4, 128),
    (2, 7, 300, 6, 2, 16),
    (1, 67, 131, 4, 1, 72),
    (3, 33, 33, 2, 2, 24),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q as a slice of a fused projection, k and v as ranges of caches whose other entries are NaN."""
    batch, queries, keys, heads, kv, width = shape
    random = torch.Generator().manual_seed(seed)
    fused = torch.randn(batch, queries, (heads + 2 * kv) * width, generator=random).to(dtype)
    q = fused[..., : heads * width].view(batch, queries, heads, width)
    caches = torch.full((2, batch, keys + 9, kv, width), torch.nan).to(dtype)
    caches[:, :, 4 : 4 + keys] = torch.randn(2, batch, keys, kv, width, generator=random).to(dtype)
    k, v = caches[:, :, 4 : 4 + keys]
    return q, k, v


def available(name: str, dtype: torch.dtype, device: str = "cpu") -> AttentionBackend:
    outcome = try_backend(attention_backend(name), AttentionRequest(torch.device(device), dtype))
    if isinstance(outcome, str):
        pytest.skip(f"{name}: {outcome}")
    return outcome


def check(
    backend: AttentionBackend,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    limit: float | None = None,
) -> None:
    q, k, v = inputs(shape, dtype)
    limit = limit or LIMIT[dtype]
    for mask in (None, Causal()):
        out = backend(q.to(device), k.to(device), v.to(device), mask)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert out.is_contiguous()
        want = reference_attention(q, k, v, mask)
        assert relative_l2(out.cpu(), want) <= limit
        assert (out.cpu().double() - want).abs().max() <= 4 * limit * want.abs().max()


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_cpu_backend_matches_float64(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(available(name, dtype), shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", [(1, 300, 1301, 28, 4, 128), (2, 130, 257, 16, 16, 72), *SHAPES], ids=str)
@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_cuda_backend_matches_float64(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    lossy = attention_backend(name).lossy
    if lossy and shape[-1] not in attention_int8.HEAD_DIMS:
        pytest.skip(f"{name} is refused for such heads")
    check(available(name, dtype, "cuda"), shape, dtype, "cuda", LOSSY_LIMIT if lossy else None)


def test_reference_is_the_definition() -> None:
    """The reference against sums written out, so that the other tests do not rest on one formula."""
    q, k, v = inputs((1, 3, 5, 4, 2, 8), torch.float32)
    out = reference_attention(q, k, v, Causal())
    for i in range(3):
        for head in range(4):
            seen = range(3 + i)
            weights = [torch.exp(q[0, i, head].double() @ k[0, j, head // 2].double() / 8**0.5) for j in seen]
            mixed = sum(w * v[0, j, head // 2].double() for w, j in zip(weights, seen, strict=True))
            torch.testing.assert_close(out[0, i, head], mixed / sum(weights))


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("keys", "score_bytes"), [(1, 1), (7, 4000), (64, 9000), (1000, 50000)])
def test_chunked_at_odd_chunk_sizes(keys: int, score_bytes: int, causal: bool, dtype: torch.dtype) -> None:
    backend = Chunked()
    backend.KEYS, backend.SCORE_BYTES = keys, score_bytes  # type: ignore[misc]
    q, k, v = inputs((2, 61, 97, 6, 2, 8) if keys > 1 else (2, 17, 29, 6, 2, 8), dtype)
    mask = Causal() if causal else None
    assert relative_l2(backend(q, k, v, mask), reference_attention(q, k, v, mask)) <= LIMIT[dtype]


def emulated_tensor_cores(a: Tensor, b: Tensor) -> Tensor:
    """What `tensor_core_products` gives, on any device: operands rounded to b's dtype, float32 sums."""
    return torch.bmm(a.to(b.dtype).float(), b.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 37, 900, 28, 4, 128)], ids=str)
def test_chunked_with_16_bit_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    backend = Chunked(emulated_tensor_cores)
    backend.KEYS, backend.SCORE_BYTES = 64, 9000  # type: ignore[misc]
    check(backend, shape, dtype)


def test_chunked_in_fp16_takes_scores_beyond_fp16() -> None:
    """Products of queries and keys have float32 results: 300 * 300 * 16 is more than float16 holds."""
    q, k, v = inputs((1, 20, 300, 4, 2, 16), torch.float16)
    out = Chunked(emulated_tensor_cores)(q * 300, k * 300, v, Causal())
    assert (q * 300).float().norm(dim=-1).max() * (k * 300).float().norm(dim=-1).max() > 65504
    assert relative_l2(out, reference_attention(q * 300, k * 300, v, Causal())) <= LIMIT[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chunked_on_a_card_multiplies_in_16_bits_or_says_why(dtype: torch.dtype) -> None:
    backend = available("chunked", dtype, "cuda")
    assert isinstance(backend, Chunked)
    assert (backend._products is tensor_core_products) != bool(backend.refused)


def test_chunked_without_16_bit_products_says_why() -> None:
    """The meta device stands for a card whose products have no values."""
    backend = CHUNKED.make(AttentionRequest(torch.device("meta"), torch.float16))
    ((name, why),) = backend.refused
    assert name == "chunked with float16 products"
    assert why


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_large_scores_do_not_overflow(name: str) -> None:
    q, k, v = inputs((1, 20, 300, 4, 2, 16), torch.float32)
    out = available(name, torch.float32)(q * 300, k * 300, v, Causal())
    assert relative_l2(out, reference_attention(q * 300, k * 300, v, Causal())) <= 1e-3


def test_causal_builds_its_mask_once_per_shape() -> None:
    mask, cpu = Causal(), torch.device("cpu")
    first = mask.visible(3, 5, cpu)
    assert first.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert mask.visible(3, 5, cpu) is first
    assert mask.visible(2, 2, cpu).tolist() == [[1, 0], [1, 1]]


def peak_bytes(
    backend: AttentionBackend,
    tokens: int,
    mask: Causal | None,
    keys: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes a call at the 7B shape needs beyond its inputs, counted on the meta device."""
    with torch.device("meta"):
        q = torch.empty(1, tokens, 28, 128, dtype=dtype)
        k, v = torch.empty(2, 1, keys or tokens, 4, 128, dtype=dtype)
        with LiveMemory() as memory:
            out = backend(q, k, v, mask)
    assert out.shape == q.shape
    return memory.peak


@pytest.mark.parametrize("tokens", [4098, 9000])
@pytest.mark.parametrize("causal", [False, True])
def test_chunked_needs_little_more_memory_than_the_efficient_kernel(tokens: int, causal: bool) -> None:
    mask = Causal() if causal else None
    least = peak_bytes(Efficient(), tokens, mask)
    for products in (upcast_products, tensor_core_products):
        assert peak_bytes(Chunked(products), tokens, mask) <= 1.3 * least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "keys"), [(300, 4000), (1026, 1026), (4098, 6000)])
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "chunked", "math"])
def test_a_backend_needs_no_more_memory_than_it_declares(name: str, tokens: int, keys: int, dtype: torch.dtype) -> None:
    spec = attention_backend(name)
    if spec.dtypes and str(dtype).removeprefix("torch.") not in spec.dtypes:
        pytest.skip(f"{name} does not compute in {dtype}")
    call = Call(tokens, keys, 28, 4, 128, dtype.itemsize)
    backend = MADE[name]()
    alive = peak_bytes(backend, tokens, None, keys, dtype) - call.result_bytes
    assert alive <= spec.cost.scratch(call)
    if name == "math":  # which planners avoid for its memory
        copied_on_cards = COPIES * 4 * keys * 28 * 128
        assert alive == pytest.approx(spec.cost.scratch(call) - copied_on_cards, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_on_a_card_a_backend_needs_no_more_memory_than_it_declares(name: str, dtype: torch.dtype) -> None:
    backend, call = available(name, dtype, "cuda"), Call(2050, 3000, 28, 4, 128, dtype.itemsize)
    q = torch.randn(1, call.tokens, 28, 128, dtype=dtype, device="cuda")
    k, v = torch.randn(2, 1, call.keys, 4, 128, dtype=dtype, device="cuda")
    backend(q, k, v)  # libraries take their workspaces once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = backend(q, k, v)
    taken = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert taken <= 1.05 * attention_backend(name).cost.scratch(call)


def test_memory_count_notices_a_quadratic_backend() -> None:
    assert peak_bytes(Plain(), 4098, None) > 10 * peak_bytes(Chunked(), 4098, None)


class Wrong(Sdpa):
    name = "wrong"

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super()._full(q, k, v) * 1.05


class NotFinite(Sdpa):
    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return super()._causal(q, k, v, mask) * torch.nan


class Raises(Sdpa):
    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")


def refuse(reason: str) -> Callable[[AttentionRequest], AttentionBackend]:
    def make(request: AttentionRequest) -> AttentionBackend:
        raise Unavailable(reason)

    return make


def declared(name: str, make: Callable[[AttentionRequest], AttentionBackend]) -> AttentionSpec:
    return AttentionSpec(name, "made up", make, order=0, cost=SDPA.cost)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, AttentionSpec]:
    makers: dict[str, Callable[[AttentionRequest], AttentionBackend]] = {
        "flash-attn": refuse("not installed"),
        "cudnn": lambda request: Wrong(),
        "flash": lambda request: Raises(),
        "efficient": lambda request: NotFinite(),
        "chunked": lambda request: Chunked(),
        "math": lambda request: Sdpa(),
    }
    specs = {name: declared(name, make) for name, make in makers.items()}
    monkeypatch.setattr(attention, "attention_backend", lambda name: specs[name])
    monkeypatch.setattr(attention, "preference", lambda capability, lossy: [*specs.values()])
    return specs


def test_selection_passes_over_what_fails_and_says_why(fakes: dict[str, AttentionSpec]) -> None:
    backend, refused = select_backend(device="cpu", dtype=torch.float32)
    assert backend.name == "chunked"
    assert dict(refused) == {
        "flash-attn": "not installed",
        "cudnn": "wrong result (relative error 5.0e-02)",
        "flash": "RuntimeError: CUDA error: no kernel image is available",
        "efficient": "wrong result (relative error inf)",
    }


def test_selection_honours_switches(fakes: dict[str, AttentionSpec]) -> None:
    backend, refused = select_backend(device="cpu", dtype=torch.float32, disabled=("chunked",))
    assert backend.name == "sdpa"
    assert ("chunked", "switched off") in refused


def test_nothing_left_is_the_users_to_know(fakes: dict[str, AttentionSpec]) -> None:
    with pytest.raises(SettingError, match=r"cannot run on cpu.*flash-attn: not installed.*doctor"):
        select_backend(device="cpu", dtype=torch.float32, disabled=("chunked", "math"))


@pytest.mark.parametrize(("heads", "width"), [(16, 72), (1, 512)])
def test_parts_take_the_decoders_backend_where_it_runs_with_their_heads(
    heads: int, width: int, fakes: dict[str, AttentionSpec]
) -> None:
    def picky(request: AttentionRequest) -> AttentionBackend:
        if request.head_dim != 128:
            raise Unavailable("heads of 128 only")
        return Sdpa()

    fakes["flash"] = declared("flash", picky)
    cpu = torch.device("cpu")
    same = select_for_part("math", device=cpu, dtype=torch.float32, num_heads=heads, head_dim=width)
    assert (same.backend.name, same.refused) == ("sdpa", [])
    other = select_for_part("flash", device=cpu, dtype=torch.float32, num_heads=heads, head_dim=width)
    assert other.backend.name == "chunked"
    assert other.refused[0] == ("flash", "heads of 128 only")


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_name_forces_the_backend(name: str) -> None:
    backend, refused = select_backend(name, device="cpu", dtype=torch.float32)
    assert backend.name == name
    assert refused == []


def test_forcing_what_cannot_run_says_why() -> None:
    with pytest.raises(SettingError, match="flash: needs a CUDA GPU"):
        select_backend("flash", device="cpu", dtype=torch.float32)
    with pytest.raises(SettingError, match="unknown attention backend 'fast'; choose auto or one of"):
        select_backend("fast", device="cpu", dtype=torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_without_a_card_is_a_users_mistake() -> None:
    with pytest.raises(SettingError, match="torch finds no CUDA GPU"):
        select_backend(device="cuda", dtype=torch.float32)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return pretend


def cuda(dtype: torch.dtype) -> AttentionRequest:
    return AttentionRequest(torch.device("cuda"), dtype)


def test_order_by_capability() -> None:
    on_cards = ["flash-attn", "cudnn", "flash", "efficient", "chunked", "math"]
    for capability in ((9, 0), (10, 0)):
        assert [spec.name for spec in preference(capability)] == ["cudnn", "flash-attn", *on_cards[2:]]
    for capability in ((7, 5), (8, 9), (12, 0)):
        assert [spec.name for spec in preference(capability)] == on_cards
    assert [spec.name for spec in preference(None)] == ["sdpa", "chunked", "math"]


@pytest.mark.parametrize("name", ["flash-attn", "cudnn", "flash"])
def test_old_cards_and_float32_are_refused_by_name(name: str, card: Callable[[int, int], None]) -> None:
    spec = attention_backend(name)
    card(7, 5)
    assert try_backend(spec, cuda(torch.float16)) == "needs compute capability 8.0; this card has 7.5"
    card(8, 6)
    assert try_backend(spec, cuda(torch.float32)) == "does not compute in float32"


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("cudnn", "cudnn_sdp_enabled"),
        ("flash", "flash_sdp_enabled"),
        ("efficient", "mem_efficient_sdp_enabled"),
    ],
)
def test_torchs_own_switches_are_respected(
    name: str, switch: str, card: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(9, 0)
    monkeypatch.setattr(torch.backends.cuda, switch, lambda: False)
    assert try_backend(attention_backend(name), cuda(torch.bfloat16)) == "switched off in torch.backends.cuda"


@pytest.mark.parametrize(("tokens", "keys"), [(300, 4000), (1026, 1026), (4098, 6000)])
def test_integers_need_no_more_memory_than_declared(tokens: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the launches."""
    for kernel in ("_sum_keys", "_quantize_keys", "_quantize_queries", "attend_tile"):
        monkeypatch.setattr(attention_int8, kernel, defaultdict(lambda: lambda *_, **options: None))
    backend = Int8(partial(attention_int8.attention_int8, launch=attention_int8.PLAIN), Sdpa())
    call = Call(tokens, keys, 28, 4, 128, 2)
    alive = peak_bytes(backend, tokens, None, keys) - call.result_bytes
    assert alive <= attention_backend("int8").cost.scratch(call)
    assert alive > call.result_bytes / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_lossy_backend_is_tried_with_outlier_keys_too(dtype: torch.dtype) -> None:
    def unsmoothed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_int8.attend_reference(attention_int8.quantize_reference(q, k), v)

    here = AttentionRequest(torch.device("cpu"), dtype)
    right, wrong = Int8(attention_int8.attention_int8_reference, Sdpa()), Int8(unsmoothed, Sdpa())
    for backend in (right, wrong):
        assert attention._trial_error(backend, here, 0.0, {}) < LOSSY_LIMIT
    assert attention._trial_error(right, here, attention.OUTLIERS, {}) < LOSSY_LIMIT
    assert attention._trial_error(wrong, here, attention.OUTLIERS, {}) > 2 * LOSSY_LIMIT
    tried: list[float] = []
    trial = attention._trial_error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_trial_error", lambda *given: tried.append(given[2]) or trial(*given))
        for lossy, backend in ((False, Sdpa()), (True, right), (True, wrong)):
            spec = replace(declared("made up", lambda request, backend=backend: backend), lossy=lossy)
            assert isinstance(try_backend(spec, here), str) == (backend is wrong)
    assert tried == [0.0, 0.0, attention.OUTLIERS, 0.0, attention.OUTLIERS]


def test_for_a_plan_nothing_is_tried_after_the_first_that_any_weights_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_bagel.ops.attention import registry

    first, *rest = (spec.name for spec in registry.preference(None))
    assert try_attention("cpu", "float32", every=False) == ((first,), {})
    assert set(try_attention("cpu", "float32", every=True)[0]) > {first, *rest[:1]}
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", first)
    running, refused = try_attention("cpu", "float32", every=False)
    assert (running, set(refused)) == ((rest[0],), {first})


def test_backends_that_are_tried_for_one_request_share_what_they_are_compared_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Tensor] = []
    monkeypatch.setattr(attention, "_trials", attention._trials.__wrapped__)  # not those that tests share
    exact = attention.reference_attention
    monkeypatch.setattr(attention, "reference_attention", lambda *given: made.append(given[0]) or exact(*given))
    running = try_attention("cpu", "float32")[0]
    assert set(running) == set(CPU_BACKENDS)
    assert len(made) == 2
    request = AttentionRequest(torch.device("cpu"), torch.bfloat16)
    assert isinstance(try_backend(attention_backend("sdpa"), request), Sdpa)
    assert len(made) == 4 and made[-1].dtype == torch.bfloat16


def test_integers_are_refused_for_other_heads_and_without_triton(
    card: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(8, 9)
    monkeypatch.setattr(attention, "_companion", lambda *_: [Sdpa()])
    spec = attention_backend("int8")
    assert try_backend(spec, replace(cuda(torch.float16), head_dim=72)) == "is for heads of 32, 64, 128, not of 72"
    assert try_backend(spec, cuda(torch.float32)) == "does not compute in float32"
    monkeypatch.setattr(triton_language, "MISSING", "there is no Triton")
    assert try_backend(spec, cuda(torch.float16)) == "there is no Triton"


def test_other_parts_never_take_a_lossy_backend(fakes: dict[str, AttentionSpec]) -> None:
    fakes["flash"] = replace(declared("flash", lambda request: Sdpa()), lossy=True)
    other = select_for_part("flash", device=torch.device("cpu"), dtype=torch.float32, num_heads=16, head_dim=72)
    assert other.refused[0] == ("flash", "lossy, and not for this part")


def test_integers_leave_small_and_causal_blocks_to_their_companion() -> None:
    def refuse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("integers")

    backend = Int8(refuse, Sdpa())
    q, k, v = inputs((2, 200, 300, 28, 4, 128), torch.float32)
    assert relative_l2(backend(q, k, v, Causal()), reference_attention(q, k, v, Causal())) <= 1e-6
    few = q[:, : Int8.MIN_QUERIES - 1]
    assert relative_l2(backend(few, k, v, None), reference_attention(few, k, v)) <= 1e-6
    with pytest.raises(NotImplementedError, match="integers"):
        backend(q, k, v, None)
    backend = Int8(attention_int8.attention_int8_reference, Sdpa())
    assert 0.001 < relative_l2(backend(q, k, v), reference_attention(q, k, v)) < LOSSY_LIMIT


def test_cudnn_leaves_small_and_causal_blocks_to_its_companion() -> None:
    backend = Cudnn(Sdpa())
    q, k, v = inputs((1, 200, 300, 28, 4, 128), torch.float32)
    assert relative_l2(backend(q, k, v, Causal()), reference_attention(q, k, v, Causal())) <= 1e-6
    few = q[:, : Cudnn.MIN_QUERIES - 1]
    assert relative_l2(backend(few, k, v, None), reference_attention(few, k, v)) <= 1e-6
    with pytest.raises(NotImplementedError, match="cudnn"):
        backend(q, k, v, None)
