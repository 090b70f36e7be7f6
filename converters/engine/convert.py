"""Converting a checkpoint: streaming, checking, sharding, resuming. What a format does is its converter's business.

Stages work at the same time: units are read ahead and hashed, encoded on all cores, and shards that are complete are
written and read back behind (`finishing`). Memory holds a shard's encoded tensors, the unit being converted, and what
`finishing` bounds: shards that wait for the disk and the unit being read ahead. A shard is journaled once it is on the
disk and was read back, so a killed conversion loses the few shards that were under way, and because every step is
deterministic the resumed result has the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from lowmem_bagel.checkpoint.manifest import (
    EXPERTS,
    MANIFEST_NAME,
    ROUNDING,
    Manifest,
    StoredFile,
    TensorRecord,
    file_sha256,
    read_manifest,
    source_digest,
)
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.errors import ConversionError
from lowmem_bagel.files import expanded

from .base import Converter, Encoded, SourceTensor
from .finishing import Finishing, Pending
from .fsio import write_file
from .journal import journaled_shards, record_shard
from .one_file import OneFile, one_file, range_sha256
from .phases import ENCODE, Phases, untimed
from .places import SpaceCheck, check_out, partial_of
from .shards import DEFAULT_SHARD_BYTES, Shard, plan_shards, plan_units
from .sidecar_files import write_companions
from .source import SourceCheckpoint
from .workspace import Workspace

KEPT_ENCODINGS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Progress:
    """Bytes of the source's tensors that are done, of all; what is being worked on."""

    done: int
    total: int
    now: str


Report = Callable[[Progress], None]


def convert(
    source: Path,
    out: Path,
    converter: Converter,
    *,
    experts: tuple[str, ...] = EXPERTS,
    overwrite: bool = False,
    restart: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    report: Report | None = None,
    phases: Phases = untimed,
    weights: str | None = None,
    base: Path | None = None,
    lora: Sequence[str] = (),
) -> Manifest:
    """Convert the checkpoint folder `source` into the variant folder `out`, or resume doing so.

    Args:
        experts: ("und", "gen"), or ("und",) for a variant that only answers: no generating expert, latents or VAE.
        overwrite: replace an existing variant at `out`, once the new one is complete.
        restart: discard unfinished work in `out`.partial.
        shard_bytes: bytes of source tensors per output file.
        weights, base, lora: which weights of the folder, the checkpoint that completes it, and the adapters that are
            added, as for `ModelFolder.open`.
        phases: what the work of each stage is done inside of (`engine.phases`).

    Raises:
        CheckpointError, ConfigError: the source is damaged.
        ConversionError: refused or stopped; unfinished work stays in `out`.partial and the same call resumes it.
    """
    if experts not in (EXPERTS, ("und",)):
        raise ConversionError(f"experts {experts}: a variant has both experts or the understanding one alone")
    out = expanded(out).absolute()
    with ExitStack() as stack:
        stack.enter_context(_writing(out))
        checkpoint = stack.enter_context(_source(source, experts, converter, weights, base, lora))
        _check_places(checkpoint.places, out)
        identity = _identity(checkpoint, converter, experts, shard_bytes)
        shards = plan_shards(plan_units(checkpoint.specs), checkpoint.nbytes, shard_bytes)
        whole = one_file(converter, checkpoint, shards)
        if whole is not None:
            identity["header"] = hashlib.sha256(whole.header).hexdigest()
        room = SpaceCheck(checkpoint, converter, out)
        if not partial_of(out).exists():
            check_out(out, overwrite=overwrite)
            room.check(shards)
        out.parent.mkdir(parents=True, exist_ok=True)
        workspace = Workspace(out, identity, overwrite=overwrite, restart=restart)
        stack.push(workspace.close_after)
        if workspace.published:
            manifest = read_manifest(out)
            assert manifest is not None
        else:
            manifest = _Conversion(checkpoint, converter, workspace, shards, report, phases, whole).run(experts, room)
    return manifest


class _Conversion:
    """One call of `convert`. `results` holds each shard that is safely on disk, with its tensors' records."""

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        converter: Converter,
        workspace: Workspace,
        shards: list[Shard],
        report: Report | None,
        phases: Phases,
        whole: OneFile | None = None,
    ) -> None:
        self.checkpoint, self.converter, self.workspace, self.whole = checkpoint, converter, workspace, whole
        self.shards, self.report, self.phases = shards, report, phases
        self.results: dict[str, tuple[StoredFile, list[TensorRecord]]] = {}
        self.done = 0
        self.total = sum(map(checkpoint.nbytes, checkpoint.specs))

    def run(self, experts: tuple[str, ...], room: SpaceCheck) -> Manifest:
        self._take_over()
        missing = [shard for shard in self.shards if shard.name not in self.results]
        room.check(missing)
        with Finishing(self.workspace.variant, self._settle, self.phases, self.whole) as finishing:
            units = chain.from_iterable(shard.units for shard in missing)
            with closing(self.checkpoint.stream(units, self.phases, finishing.wait_for_room)) as read:
                for shard in missing:
                    pending = list(chain.from_iterable(self._encoded(shard, next(read)) for _ in shard.units))
                    self._tell(shard.name)
                    finishing.add(shard.name, pending)
        self._tell("finishing")
        manifest, text = self._manifest(experts)
        write_file(self.workspace.variant / MANIFEST_NAME, text)
        self.workspace.publish()
        return manifest

    def _take_over(self) -> None:
        """Believe the journal where a shard has the bytes that it says; the others are converted again."""
        planned = {shard.name: shard for shard in self.shards}
        for stored, records in journaled_shards(self.workspace.journal):
            if stored.name in planned and self._sha256(planned[stored.name], stored) == stored.sha256:
                self.results[stored.name] = stored, records
        self.done = sum(self._size(planned[name]) for name in self.results)

    def _sha256(self, shard: Shard, stored: StoredFile) -> str:
        """Of what is there of a shard; empty where nothing is."""
        path = self.workspace.variant / (stored.name if self.whole is None else self.whole.name)
        if not path.is_file():
            return ""
        return file_sha256(path) if self.whole is None else range_sha256(path, self.whole.start(shard), stored.bytes)

    def _encoded(self, shard: Shard, tensors: list[SourceTensor]) -> list[Pending]:
        self._tell(tensors[0].spec.name)
        with self.phases(ENCODE):
            file = shard.name if self.whole is None else self.whole.name
            pending = [_pending(item, file) for item in self._encode(tensors)]
        self.done += sum(self.checkpoint.nbytes(tensor.spec) for tensor in tensors)
        return pending

    def _settle(self, stored: StoredFile, records: list[TensorRecord]) -> None:
        self.checkpoint.check_unchanged()
        record_shard(self.workspace.journal, stored, records)
        self.results[stored.name] = stored, records

    def _encode(self, tensors: list[SourceTensor]) -> Iterator[Encoded]:
        encodes = {self.converter.encodes(tensor.spec) for tensor in tensors}
        assert len(encodes) == 1, "a unit is encoded whole or kept whole"
        if encodes == {True}:
            yield from self.converter.convert(tensors)
            return
        for tensor in tensors:
            if not self.converter.lossless:  # a codec checks what it encodes itself
                require_finite(tensor)
            yield Encoded(
                tensor, KEPT_ENCODINGS[str(tensor.data.dtype).removeprefix("torch.")], {tensor.spec.name: tensor.data}
            )

    def _manifest(self, experts: tuple[str, ...]) -> tuple[Manifest, bytes]:
        results = [self.results[shard.name] for shard in self.shards]
        tensors = {record.name: record for _, records in results for record in records}
        entries = self.converter.config_entries(self.checkpoint.specs)
        shards = {stored.name: stored for stored, _ in results}
        if self.whole is None:
            files = write_companions(self.checkpoint, self.workspace.variant, entries, tensors.values())
        else:
            files, shards = {}, {self.whole.name: self.whole.finish(self.workspace.variant)}
        self.checkpoint.check_unchanged()
        manifest = Manifest(
            format=self.converter.name,
            format_version=self.converter.version,
            tool_version=version("lowmem-bagel"),
            experts=experts,
            options={**self.converter.options, **self.checkpoint.options},
            source=self.checkpoint.path.name or "/",
            source_sha256=source_digest(tensors.values()),
            shards=shards,
            files=files,
            tensors=tensors,
        )
        text = manifest.to_json()
        read = Manifest.from_json(text)
        assert read == manifest, "a manifest must read back as it was written"
        return read, text

    def _size(self, shard: Shard) -> int:
        return sum(self.checkpoint.nbytes(spec) for unit in shard.units for spec in unit.specs)

    def _tell(self, now: str) -> None:
        if self.report is not None:
            self.report(Progress(self.done, self.total, now))


def require_finite(tensor: SourceTensor) -> None:
    """Raises ConversionError naming a tensor that holds NaN or an infinity."""
    from lowmem_bagel.formats.rows import all_finite

    if not all_finite(tensor.data):
        raise ConversionError(
            f"tensor {tensor.spec.name} holds NaN or an infinity, so the checkpoint is broken; take another "
            "(only dfloat11 keeps such values as they are)"
        )


def _pending(item: Encoded, file: str) -> Pending:
    """What is to be written. Of the source's tensor only the record stays, where the tensor itself is not stored."""
    source, tensors = item.source, list(item.stored.values())
    kept = len(tensors) == 1 and tensors[0] is source.data and source.rounding is None  # then its hash is known
    rounding = {} if source.rounding is None else {ROUNDING: source.rounding}
    record = TensorRecord(
        name=source.spec.name,
        encoding=item.encoding,
        dtype=source.dtype,
        shape=source.shape,
        file=file,
        stored=tuple(item.stored),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        sha256=source.sha256 if kept else "",
        source_sha256=source.sha256,
        errors={**item.errors, **rounding},
        options=dict(item.options),
    )
    return Pending(record, item.stored)


def _identity(
    checkpoint: SourceCheckpoint, converter: Converter, experts: tuple[str, ...], shard_bytes: int
) -> dict[str, Any]:
    """All that the resulting bytes depend on; unfinished work is valid only for the same."""
    return {
        "source": checkpoint.fingerprint(),
        "format": [converter.name, converter.version],
        "options": dict(converter.options),
        "experts": list(experts),
        "shard_bytes": shard_bytes,
        "tool_version": version("lowmem-bagel"),
    }


def _source(
    path: Path,
    experts: tuple[str, ...],
    converter: Converter,
    weights: str | None,
    base: Path | None,
    lora: Sequence[str],
) -> SourceCheckpoint:
    def as_stored(spec: TensorSpec) -> bool:
        """What an encoding loses is lost once, and of the source's values."""
        return getattr(converter, "as_stored", False) or (converter.encodes(spec) and not converter.lossless)

    return SourceCheckpoint(path, experts, as_stored=as_stored, weights=weights, base=base, lora=lora)


def _check_places(sources: set[Path], out: Path) -> None:
    for place in (out.resolve(), partial_of(out).resolve()):
        if any(source == place or place in source.parents for source in sources):
            raise ConversionError(f"{out}: the source lies there; choose another folder for the result")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """What the operating system refuses, as one line that says what to do."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)
        raise ConversionError(
            f"{error.filename or out}: {what}; put it right and run the same command again: what is done, if anything "
            f"was, stays in {partial_of(out).name}"
        ) from error
