"""One cache per request: branches of guidance share it, lie in one range with the picture, and nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config import DecoderConfig
from lowmem_bagel.generation.inputs import Contexts, PictureBlock, TextBlock, open_terms, read_terms
from lowmem_bagel.model.kv_cache import AppendAttention, Excerpt, KVCache, PictureAttention, Region, SequenceView
from lowmem_bagel.ops.attention.base import AttentionBackend, Causal
from lowmem_bagel.ops.attention.select import select_backend

CONFIG = DecoderConfig(64, 2, 4, 2, 128, 100, 1e6, 1e-6)
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8))
OTHER = PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
ORDERS: dict[str, list[Any]] = {
    "text": ["a red circle"],
    "texts": ["a red circle", "and a blue square"],
    "edit": [PICTURE, "make it green"],
    "text around": ["this is a circle:", PICTURE, "make it green"],
    "text before": ["a red circle like this:", PICTURE],
    "picture alone": [PICTURE],
    "two pictures": [PICTURE, "and", OTHER, "side by side"],
    "pictures first": [PICTURE, OTHER, "side by side"],
    "picture last": ["a circle", PICTURE, "a square", OTHER],
}


def nan_cache(capacity: int) -> KVCache:
    made = KVCache(CONFIG, capacity, torch.float32, torch.device("cpu"))
    for tensor in (made.keys, made.values):
        tensor.fill_(float("nan"))
    return made


def joined(view: SequenceView, scratch: range) -> set[int]:
    """Places in the cache that a branch sees while a picture is drawn."""
    return {place for span in [*view.spans, scratch] for place in span}


def is_one_range(places: set[int]) -> bool:
    return places == set(range(min(places), max(places) + 1))


@pytest.fixture(scope="module")
def backend() -> AttentionBackend:
    return select_backend(
        "auto", device=torch.device("cpu"), dtype=torch.float32, num_heads=4, num_kv_heads=2, head_dim=16
    ).backend


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """By the definition, in float64. q [T, H, d], k and v [S, KV, d]; mask [T, S], True where visible."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v)


class TestBookkeeping:
    def test_positions_and_spans(self) -> None:
        view = SequenceView(nan_cache(100), Region(20, 100))
        assert view.append(5, 5) == range(20, 25)
        assert view.append(10, 1) == range(25, 35)
        assert (view.length, view.position, view.spans) == (15, 6, [range(20, 35)])

    def test_fork_sees_the_past_alone(self) -> None:
        view = SequenceView(nan_cache(100), Region(0, 100))
        view.append(5, 5)
        fork = view.fork()
        view.append(3, 3)
        assert (fork.length, fork.position, view.length) == (5, 5, 8)
        assert fork.kv_cache is view.kv_cache
        assert not fork.same_as(view)
        assert fork.same_as(fork.fork())

    def test_drop_after(self) -> None:
        view = SequenceView(nan_cache(100), Region(0, 100))
        view.append(5, 5)
        view.append(7, 7)
        view.drop_after(5, 5)
        assert (view.length, view.position) == (5, 5)
        assert view.append(2, 2) == range(5, 7)

    def test_room_that_runs_out_is_our_fault(self) -> None:
        view = SequenceView(nan_cache(10), Region(0, 10))
        with pytest.raises(AssertionError, match="room for 10 more tokens, 11 wanted"):
            view.append(11, 11)

    def test_growing_keeps_what_is_there(self) -> None:
        made = nan_cache(10)
        made.keys.copy_(torch.randn(made.keys.shape))
        before = made.keys.clone()
        made.grow(5)
        assert made.capacity == 15
        assert torch.equal(made.keys[:, :10], before)

    def test_adjoining_spans_are_a_view(self) -> None:
        made = nan_cache(20)
        keys, values = made.read(1, [range(3, 7), range(7, 12)])
        assert keys.data_ptr() == made.keys[1, 3].data_ptr()
        assert values.data_ptr() == made.values[1, 3].data_ptr()
        assert keys.shape == (1, 9, 2, 16)


class TestAttention:
    def test_appended_text_is_causal(self, backend: AttentionBackend) -> None:
        torch.manual_seed(0)
        view = SequenceView(nan_cache(30), Region(4, 30))
        past, new = (torch.randn(2, 1, count, 2, 16) for count in (6, 3))
        for layer in range(2):
            view.kv_cache.write(layer, 4, past[0, 0], past[1, 0])
        view.append(6, 6)
        q = torch.randn(1, 3, 4, 16)
        span = view.append(3, 3)
        found = AppendAttention(view, span, backend, Causal())(1, q, *new)[0]
        visible = torch.cat((torch.ones(3, 6, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool).tril()), dim=1)
        wanted = softmax_attention(q[0], *(torch.cat((p[0], n[0])) for p, n in zip(past, new, strict=True)), visible)
        assert (found[0].double() - wanted).abs().max() < 1e-5

    def test_branches_see_their_own_tokens_and_the_picture(self, backend: AttentionBackend) -> None:
        """Poisoned memory around the branches: a key too many would make NaN."""
        torch.manual_seed(1)
        made = nan_cache(40)
        scratch, side, main = range(5, 12), range(5), range(12, 30)
        for place in (*side, *main):
            made.write(0, place, torch.randn(1, 2, 16), torch.randn(1, 2, 16))
        branches = [
            SequenceView(made, Region(12, 40), [range(12, 30)]),
            SequenceView(made, Region(12, 40), [range(12, 20)]),
            SequenceView(made, Region(0, 5), [range(12, 15), range(5)]),
        ]
        q, k, v = torch.randn(3, 7, 4, 16), torch.randn(3, 7, 2, 16), torch.randn(3, 7, 2, 16)
        found = PictureAttention(branches, scratch, backend)(0, q, k, v)
        for index, branch in enumerate(branches):
            places = [place for span in branch.spans for place in span]
            keys = torch.cat((made.keys[0, places], k[index]))
            values = torch.cat((made.values[0, places], v[index]))
            wanted = softmax_attention(q[index], keys, values)
            assert (found[index][0].double() - wanted).abs().max() < 1e-5


def prefilled(pipe: BagelPipeline, terms: Sequence[Any], picture_tokens: int = 18) -> Contexts:
    model = pipe.model
    with torch.inference_mode():
        blocks = read_terms(open_terms(terms), model.folder.config, model.tokenizer, drawing=True)
        contexts = Contexts(model, blocks, picture_tokens, image_branch=True, spare=0)
        for block in blocks:
            contexts.append(block, torch.Generator().manual_seed(0))
    return contexts


class TestLayout:
    @pytest.mark.parametrize("order", ORDERS)
    def test_every_branch_is_one_range_with_the_picture(self, small_pictures: BagelPipeline, order: str) -> None:
        contexts = prefilled(small_pictures, ORDERS[order])
        branches = contexts.branches()
        assert branches.image is not None
        for branch in (branches.full, branches.text, branches.image):
            assert branch.kv_cache is contexts.kv_cache
            assert is_one_range(joined(branch, contexts.scratch))
            assert not set(contexts.scratch) & {place for span in branch.spans for place in span}

    @pytest.mark.parametrize("order", ORDERS)
    def test_what_every_branch_holds(self, small_pictures: BagelPipeline, order: str) -> None:
        """full: everything. text: what stood before the last text, or all if a picture followed. image: the texts."""
        model = small_pictures.model
        blocks = read_terms(open_terms(ORDERS[order]), model.folder.config, model.tokenizer, drawing=True)
        branches = prefilled(small_pictures, ORDERS[order]).branches()
        ends_with_text = isinstance(blocks[-1], TextBlock)
        everything = sum(block.tokens for block in blocks)
        assert branches.image is not None
        assert branches.full.length == everything
        assert branches.text.length == everything - (blocks[-1].tokens if ends_with_text else 0)
        assert branches.image.length == sum(block.tokens for block in blocks if isinstance(block, TextBlock))

    @pytest.mark.parametrize("order", ORDERS)
    def test_rope_positions(self, small_pictures: BagelPipeline, order: str) -> None:
        """A text advances by its tokens, a picture by one for its VAE block and one for its ViT block."""
        model = small_pictures.model
        blocks = read_terms(open_terms(ORDERS[order]), model.folder.config, model.tokenizer, drawing=True)
        branches = prefilled(small_pictures, ORDERS[order]).branches()
        assert branches.full.position == sum(2 if isinstance(b, PictureBlock) else b.tokens for b in blocks)
        assert branches.image is not None
        assert branches.image.position == sum(b.tokens for b in blocks if isinstance(b, TextBlock))

    def test_the_cache_holds_no_more_than_needed(self, small_pictures: BagelPipeline) -> None:
        contexts = prefilled(small_pictures, ORDERS["text around"])
        branches = contexts.branches()
        assert branches.image is not None
        places = set().union(*(joined(b, contexts.scratch) for b in (branches.full, branches.text, branches.image)))
        assert places == set(range(contexts.kv_cache.capacity))


class TestRequests:
    @pytest.mark.parametrize("order", ["text", "edit", "text around", "two pictures"])
    def test_denoising_copies_no_keys(
        self, small_pictures: BagelPipeline, order: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every read of the loop is a view of the one cache."""
        caches: list[KVCache] = []
        reads = 0
        drawing = False
        make, read, draw = KVCache.__init__, KVCache.read, PictureAttention.__call__

        def made(self: KVCache, *arguments: Any) -> None:
            make(self, *arguments)
            caches.append(self)

        def counted(self: KVCache, layer: int, spans: Sequence[range]) -> tuple[Tensor, Tensor]:
            nonlocal reads
            keys, values = read(self, layer, spans)
            if drawing:
                reads += 1
                assert keys.untyped_storage().data_ptr() == self.keys.untyped_storage().data_ptr()
                assert values.untyped_storage().data_ptr() == self.values.untyped_storage().data_ptr()
            return keys, values

        def drawn(self: PictureAttention, *arguments: Any) -> Sequence[Tensor]:
            nonlocal drawing
            drawing = True
            result = draw(self, *arguments)
            drawing = False
            return result

        monkeypatch.setattr(KVCache, "__init__", made)
        monkeypatch.setattr(KVCache, "read", counted)
        monkeypatch.setattr(PictureAttention, "__call__", drawn)
        small_pictures.run(
            ORDERS[order], height=32, width=48, num_timesteps=3, cfg_img_scale=1.5, cfg_interval=(0, 1), seed=0
        )
        assert len(caches) == 1
        branches = 2 if order == "text" else 3
        assert reads == 2 * branches * small_pictures.model.folder.config.decoder.num_layers


@pytest.mark.parametrize("order", ORDERS)
def test_an_excerpt_has_what_its_branches_see_in_the_same_order(small_pictures: BagelPipeline, order: str) -> None:
    config, tokenizer = small_pictures.model.folder.config, small_pictures.model.tokenizer
    blocks = read_terms(open_terms(ORDERS[order]), config, tokenizer, drawing=True)
    with torch.inference_mode():
        contexts = Contexts(small_pictures.model, blocks, 8, image_branch=True, spare=0)
        for block in blocks:
            contexts.append(block, torch.Generator().manual_seed(0))
        whole = [tensor.clone() for tensor in (contexts.kv_cache.keys, contexts.kv_cache.values)]
        for names in (("text",), ("image",), ("text", "image")):
            for tensor, filled in zip((contexts.kv_cache.keys, contexts.kv_cache.values), whole, strict=True):
                tensor.copy_(filled)
            views = [getattr(contexts.branches(), name) for name in names]
            check_excerpt(contexts, [view for view in views if view is not None])


def check_excerpt(contexts: Contexts, views: list[SequenceView]) -> None:
    """Attention to it is the very same: keys of other branches, which are NaN here, are not taken along."""
    cache, decoder = contexts.kv_cache, contexts.model.folder.config.decoder
    seen = {place for view in views for place in joined(view, contexts.scratch)}
    for place in set(range(cache.capacity)) - seen:
        cache.keys[:, place] = cache.values[:, place] = float("nan")
    excerpt = Excerpt.of(views, contexts.scratch)
    there = KVCache(decoder, excerpt.tokens, torch.float32, torch.device("cpu"))
    for tensor in (there.keys, there.values):
        tensor.fill_(float("nan"))
    for ours, theirs in excerpt.pieces(cache, there):
        assert ours.is_contiguous() and theirs.is_contiguous()
        theirs.copy_(ours)
    heads = {"num_heads": decoder.num_heads, "num_kv_heads": decoder.num_kv_heads, "head_dim": decoder.head_dim}
    backend = select_backend("math", device=torch.device("cpu"), dtype=torch.float32, **heads).backend
    q = torch.randn(1, 8, decoder.num_heads, decoder.head_dim)
    k, v = torch.randn(2, 1, 8, decoder.num_kv_heads, decoder.head_dim).unbind(0)
    for view in views:
        found, wanted = (
            PictureAttention([seeing], scratch, backend)(1, q, k, v)[0]
            for seeing, scratch in ((excerpt.view(view, there), excerpt.scratch), (view, contexts.scratch))
        )
        assert torch.equal(found, wanted) and found.isfinite().all()
        assert excerpt.view(view, there).position == view.position
    assert excerpt.tokens == len(seen)
