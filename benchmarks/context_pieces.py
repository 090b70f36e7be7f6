"""What lies between a question about a picture and its first token, piece by piece."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch

from lowmem_bagel.checkpoint.tensors import Expert
from lowmem_bagel.errors import Cancelled
from lowmem_bagel.generation.inputs import Contexts, PictureBlock, append_framed, read_terms, shown_patches
from lowmem_bagel.ops.device import synchronize
from lowmem_bagel.pipeline import BagelPipeline
from lowmem_bagel.runtime.context_store import ContextStore, key_after
from lowmem_bagel.sampling.text import TokenChoice


def passes(pipe: BagelPipeline, question: str, shown: Any) -> int:
    """Over all layers, until a question's first token."""
    count = 0
    source = pipe.model.bagel.decoder.source
    begin = source.begin

    def counted(experts: Collection[Expert]) -> None:
        nonlocal count
        count += 1
        begin(experts)

    vars(source)["begin"] = counted
    try:
        with suppress(Cancelled):  # unless the first token is the last
            pipe.ask(question, shown, max_new_tokens=2, callback=lambda _: False)
    finally:
        del vars(source)["begin"]
    return count


def pieces(pipe: BagelPipeline, question: str, shown: Any, repeat: int) -> dict[str, float]:
    """Seconds of each, waited for, the median of some after one.

    `restore` takes the place of `preprocess`, `see`, `look` and `keep` where the picture was seen before.
    """
    with pipe.model.on_device(), torch.inference_mode():
        return _Pieces(pipe, question, shown, repeat).measured()


class _Pieces:
    def __init__(self, pipe: BagelPipeline, question: str, shown: Any, repeat: int) -> None:
        self.pipe, self.model, self.repeat = pipe, pipe.model, repeat
        self.terms = [shown, question]
        self.prepared = pipe.prepare(self.terms, output="text")
        self.blocks = self._read()
        assert isinstance(self.blocks[0], PictureBlock)
        self.picture = self.blocks[0]

    def measured(self) -> dict[str, float]:
        model, generator, choice = self.model, torch.Generator(), TokenChoice()
        store = model.context_store
        assert store is not None
        contexts, patches = self._contexts(), self._preprocessed()
        tokens = self._seen(patches)
        key = key_after(b"", b"benchmark")

        def look() -> range:
            contexts.full.drop_after(0, 0)
            append_framed(model, contexts.full, "und", tokens)
            return contexts.full.spans[-1]

        def keep() -> ContextStore:
            store.clear()
            store.keep(key, contexts.kv_cache, rows)
            return store

        def ask() -> torch.Tensor:
            contexts.full.drop_after(self.picture.tokens, 1)
            return contexts.append_and_start(self.blocks[1], generator)

        def choose() -> int:
            with model.using("lm_head"):
                return choice(model.bagel.logits(hidden)[0, 0], generator)

        rows = look()
        hidden = ask()
        return {
            "open": self._seconds(lambda: self.pipe.prepare(self.terms, output="text")),
            "tokenize": self._seconds(self._read),
            "allocate": self._seconds(self._contexts),
            "hash": self._seconds(lambda: self._fresh().digest),
            "preprocess": self._seconds(self._preprocessed),
            "see": self._seconds(lambda: self._seen(patches)),
            "look": self._seconds(look),
            "keep": self._seconds(keep),
            "restore": self._seconds(lambda: store.restore(key, contexts.kv_cache, rows)),
            "ask": self._seconds(ask),
            "choose": self._seconds(choose),
        }

    def _seconds(self, work: Callable[[], object]) -> float:
        took = []
        for _ in range(self.repeat + 1):
            synchronize(self.model.bagel.device)
            start = time.perf_counter()
            work()
            synchronize(self.model.bagel.device)
            took.append(time.perf_counter() - start)
        return statistics.median(took[1:])

    def _read(self) -> list[Any]:
        return list(read_terms(self.prepared.terms, self.model.folder.config, self.model.tokenizer, drawing=False))

    def _contexts(self) -> Contexts:
        return Contexts(self.model, self.blocks, 0, image_branch=False, spare=1)

    def _fresh(self) -> PictureBlock:
        """The picture as a request brings it, with nothing made of it yet."""
        return PictureBlock(self.picture.picture, for_drawing=False, config=self.picture.config)

    def _preprocessed(self) -> torch.Tensor:
        with self.model.using("vit"):
            return shown_patches(self.model, self._fresh())

    def _seen(self, patches: torch.Tensor) -> torch.Tensor:
        with self.model.using("vit"):
            return self.model.bagel.embed_picture(patches, *self.picture.vit_grid)
