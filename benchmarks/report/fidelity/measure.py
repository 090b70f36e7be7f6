"""Every variant, step cache, adapter and arithmetic compared with its source, one load after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .compare import compared
from .observe import Seen, Track, Work, observe
from .subjects import Checkpoint, RandomWeights, stored_bytes

if TYPE_CHECKING:
    from lowmem_bagel.checkpoint.folder import ModelFolder
    from lowmem_bagel.pipeline import BagelPipeline

    from ...suites.accuracy import Tallies

Kind = Literal["format", "step cache", "adapter", "arithmetic"]
Results = dict[str, Any]
Report = Callable[[Results], None]
"""Called with all that is known, after each variant."""

NO_FIGURES = dict.fromkeys(("exact", "text", "pictures", "velocity", "layers", "accuracy"))


@dataclass(frozen=True)
class Wanted:
    """What is compared. adapters: folders by name. arithmetic: dtypes, which are compared with float32."""

    variants: Sequence[str] = ()
    step_caches: Sequence[str] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    arithmetic: Sequence[str] = ()


@dataclass(frozen=True)
class Terms:
    """How it is measured.

    dtype: of the source and of what is compared with it, but for `Wanted.arithmetic`. judged: answers, drawings and
    edits that the demo checkpoint's judge is shown, so many of each; 0 for none. pictures: the folder that the first
    `kept` pictures of each go to, beside the record; None for none.
    """

    device: str
    dtype: str
    work: Work
    judged: int = 0
    pictures: Path | None = None
    kept: int = 3


@dataclass(frozen=True)
class _Reference:
    """What others are compared with; `tallies` of `suites.accuracy`, None where nothing is judged."""

    seen: Seen
    track: Track
    tallies: Tallies | None


def measure_fidelity(subject: Checkpoint | RandomWeights, wanted: Wanted, terms: Terms, report: Report) -> Results:
    """The part "fidelity" of a report's record; docs/fidelity.md says what is in it.

    A variant that fails is a row that says why. `report` gets all that is known so far after each.

    Raises:
        UserError: the source itself cannot be used.
    """
    return _Measuring(subject, terms, report).run(wanted)


class _Measuring:
    """One run: what its steps share."""

    def __init__(self, subject: Checkpoint | RandomWeights, terms: Terms, report: Report) -> None:
        self.subject, self.terms, self.report = subject, terms, report
        self.results: Results = {"material": dict(terms.work.material.about), "source": {}, "variants": []}

    def run(self, wanted: Wanted) -> Results:
        own = self._own_dtype() if wanted.arithmetic else ""
        wide = self._float32() if wanted.arithmetic and own != "float32" else None
        with self._loaded(self.subject.source(), self.terms.dtype) as pipe:
            source = self._reference(pipe)
            self.results["source"] = self._about(pipe) | {"files": self._save("source", source.seen)}
            self.report(self.results)

            def same() -> AbstractContextManager[BagelPipeline]:
                return nullcontext(pipe)

            for cache in wanted.step_caches:
                self._add(cache, "step cache", source, same, cache)
            if own in wanted.arithmetic:
                self._add(own, "arithmetic", wide or source, same)
        for dtype in wanted.arithmetic:
            if dtype != own:
                self._add(dtype, "arithmetic", wide or source, partial(self._computed, dtype))
        del wide  # a gigabyte at the 7B shape
        for name in wanted.variants:
            self._add(name, "format", source, partial(self._variant, name))
        for name, folder in wanted.adapters.items():
            self._add(name, "adapter", source, partial(self._adapted, folder))
        return self.results

    def _add(
        self, name: str, kind: Kind, reference: _Reference, load: Callable[[], AbstractContextManager[BagelPipeline]],
        step_cache: str = "none",
    ) -> None:  # fmt: skip
        """One more row, measured or not."""
        begun = time.perf_counter()
        row: Results = {"name": name, "kind": kind, "state": "measured", "why": None, **NO_FIGURES}
        try:
            with load() as pipe:
                row |= self._about(pipe) | self._figures(name, pipe, reference, step_cache)
        except Exception as error:  # what fails is a row, and the others still count
            row |= NO_FIGURES | _failure(error)
        gc.collect()  # a failure's traceback held the model
        row["seconds"] = round(time.perf_counter() - begun, 2)
        self.results["variants"].append(row)
        self.report(self.results)

    def _figures(self, name: str, pipe: BagelPipeline, reference: _Reference, step_cache: str) -> Results:
        from ...suites.accuracy import compare

        seen, _ = observe(pipe, self.terms.work, reference.track, step_cache)
        figures = compared(seen, reference.seen)
        if figures["pictures"] is not None:
            figures["pictures"]["files"] = self._save(name, seen)
        tallies = self._judged(pipe, step_cache)
        if tallies is not None and reference.tallies is not None:
            figures["accuracy"] = {"tasks": compare(tallies, reference.tallies)}
        return figures

    def _own_dtype(self) -> str:
        """What the source will be computed in."""
        from lowmem_bagel.planner.estimate import plan_for
        from lowmem_bagel.settings import LoadOptions

        return plan_for(self.subject.source(), LoadOptions(device=self.terms.device, dtype=self.terms.dtype)).dtype

    def _float32(self) -> _Reference:
        with self._computed("float32") as pipe:
            return self._reference(pipe)

    def _reference(self, pipe: BagelPipeline) -> _Reference:
        seen, track = observe(pipe, self.terms.work, None)
        return _Reference(seen, track, self._judged(pipe, "none"))

    def _computed(self, dtype: str) -> AbstractContextManager[BagelPipeline]:
        return self._loaded(self.subject.source(), dtype)

    @contextmanager
    def _variant(self, name: str) -> Iterator[BagelPipeline]:
        with self.subject.variant(name) as folder, self._loaded(folder, self.terms.dtype) as pipe:
            yield pipe

    def _adapted(self, adapter: str) -> AbstractContextManager[BagelPipeline]:
        return self._loaded(self.subject.source().adapted([adapter]), self.terms.dtype)

    @contextmanager
    def _loaded(self, folder: ModelFolder, dtype: str) -> Iterator[BagelPipeline]:
        from lowmem_bagel.pipeline import BagelPipeline

        size = min(self.terms.work.size, folder.max_side)
        options: dict[str, Any] = {"device": self.terms.device, "dtype": dtype, "size": (size, size), "tune": False}
        pipe = BagelPipeline.from_folder(folder, **options)
        try:
            yield pipe
        finally:
            pipe.close()

    def _about(self, pipe: BagelPipeline) -> Results:
        """What was loaded, and what multiplies by its weights."""
        plan, folder = pipe.model.plan, pipe.model.folder
        return {
            "dtype": plan.dtype, "attention": pipe.model.attention.name, "linears": plan.reasons["linears"],
            "stored_bytes": stored_bytes(folder),
        }  # fmt: skip

    def _judged(self, pipe: BagelPipeline, step_cache: str) -> Tallies | None:
        from ...suites.accuracy import tallied

        judged, work = self.terms.judged, self.terms.work
        counts = dict.fromkeys(("answers", "drawings", "edits"), judged)
        settings = {**counts, "seed": work.seed, "num_timesteps": work.num_timesteps}
        return tallied(pipe, settings, step_cache) if judged else None

    def _save(self, name: str, seen: Seen) -> list[str]:
        """The first pictures as files; their paths from the record's folder."""
        from PIL import Image

        place = self.terms.pictures
        if place is None or not seen.pictures:
            return []
        place.mkdir(exist_ok=True)
        names = [f"{name.replace('/', '-').replace(' ', '-')}-{i}.png" for i in range(self.terms.kept)]
        for file, pixels in zip(names, seen.pictures, strict=False):
            Image.fromarray(pixels).save(place / file)
        return [f"{place.name}/{file}" for file, _ in zip(names, seen.pictures, strict=False)]


def _failure(error: Exception) -> Results:
    """The row's state and why, in one line."""
    import torch

    from lowmem_bagel.errors import DoesNotFitError, SettingError, first_line

    state = "not here" if isinstance(error, SettingError) else "failed"
    if isinstance(error, (DoesNotFitError, torch.OutOfMemoryError)):
        state = "out of memory"
    return {"state": state, "why": f"{type(error).__name__}: {first_line(error)}"}
