"""What a source folder holds, found before it is a `ModelFolder`: weights chosen and named, the rest completed.

What the folder lacks a base may lend; lm_head may be the embedding; tables of positions are computed. All that was
decided is said in the reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from .config import BagelConfig, read_json
from .config_files import ConfigFiles, Described, gather, read_config, says_to_be
from .gguf_file import GgufFile, open_tensors
from .naming import Names, not_bagel, resolve, resolve_vae, split_vae, vit_layers_run
from .reading import Reading, counted, part_of
from .routed import line as experts_line
from .routed import with_routed
from .safetensors_file import TensorFile
from .stored import Sines, StoredTensor
from .tensors import EMBEDDING, LATENT_POSITIONS, LM_HEAD, VIT_POSITIONS, TensorSpec, tensor_table
from .tokenizer import has_tokenizer
from .weights import Chosen, choose, vae_file

MAX_SIDE = 256
"""Of a table of positions that is computed: four times the published one's, and no file can ask for all memory."""
POSITIONS = {LATENT_POSITIONS: "latent", VIT_POSITIONS: "vit"}
AROUND = ("vae", "vit", "connector", "latent")
"""Parts that DFloat11 never encodes."""


@dataclass(frozen=True)
class Lender:
    """A base: what it is called, its tensors, its configuration and its tower's layers."""

    name: str
    stored: Mapping[str, StoredTensor]
    configs: ConfigFiles
    vit_layers: int


@dataclass(frozen=True)
class SourceFiles:
    """What was found: see `folder.ModelFolder`."""

    config: BagelConfig
    format: str
    files: list[TensorFile]
    stored: dict[str, StoredTensor]
    reading: Reading
    configs: ConfigFiles


@dataclass
class _Found:
    """What is found while it is looked for."""

    stored: dict[str, StoredTensor]
    lines: dict[str, str]


def read_source(folder: Path, weights: str | None, lender: Lender | None) -> SourceFiles:
    """Look through a folder that has no manifest; headers and JSON files alone are read.

    Raises:
        CheckpointError, ConfigError: as for `ModelFolder.open`.
    """
    chosen = choose(folder, weights)
    files = [open_tensors(path) for path in chosen.chosen.files]
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    configs = gather(folder, metadata)
    lines = {"weights": _chosen_line(chosen)}
    format = "source" if isinstance(files[0], GgufFile) else _published_format(folder)
    names = Names.of(files)
    says = quantized_by(configs) or says_to_be(configs.whole) or ""
    if names.strange:
        alone = any(name == "decoder.conv_in.weight" for name in names.pieces)
        what = "holds an autoencoder alone; name the model's weights" if alone else not_bagel(names.pieces, says)
        raise CheckpointError(f"{folder}: {chosen.chosen.name} {what}")
    described = read_config(
        configs.completed(None if lender is None else lender.configs), tower=names.vit_layers > 0 or lender is not None
    )
    described = as_built(described, names, lender)
    if format != "source":
        return _published(folder, described, format, files, names, Reading(lines), configs, lender)
    table = tensor_table(described.config)
    vae = split_vae(names, table)
    resolved = resolve(names, described.config, table, str(folder), says)
    found = _Found(resolved.stored, lines | {"names": names.note()})
    path = None if vae.pieces else vae_file(folder) or vae_file(files[0].path.parent)
    if vae.pieces:
        found.stored |= resolve_vae(vae, table, str(folder))
    elif path is not None:
        file = open_tensors(path)
        files.append(file)
        found.stored |= resolve_vae(Names.of([file]), table, str(folder))
    _complete(found, described, table, lender, configs)
    ignored = [f"{count} {kind}" for kind, count in sorted(resolved.ignored.items())]
    if quantized := quantized_by(configs):
        ignored.append(f"{quantized}, which the tensors need not")
    found.lines["ignored"] = ", ".join(ignored)
    found.lines["experts"] = experts_line(described.config.decoder, described.experts)
    found.lines["dtypes"] = _dtypes(found.stored, table)
    lacking = counted(spec for name, spec in table.items() if name not in found.stored)
    no_tokenizer = "" if lender is not None or has_tokenizer(configs.small) else "the tokenizer"
    found.lines["lacking"] = ", ".join(part for part in (lacking, no_tokenizer) if part)
    ordered = {name: found.stored[name] for name in table if name in found.stored}
    format = _block_format(ordered.values()) or format
    return SourceFiles(described.config, format, files, ordered, Reading().joined(**found.lines), configs)


def _block_format(stored: Iterable[StoredTensor]) -> str:
    """The format of weights in blocks of GGUF's, by the type that most of their bytes have; empty where none are."""
    nbytes: Counter[str] = Counter()
    for one in stored:
        if one.encoded:
            nbytes[one.entry.dtype] += one.entry.nbytes
    return f"gguf-{nbytes.most_common(1)[0][0].lower()}" if nbytes else ""


def _chosen_line(chosen: Chosen) -> str:
    others = ", ".join(one.words for one in chosen.others)
    said = [chosen.chosen.words, *([f"not {others}"] if others else []), *chosen.notes]
    return "; ".join(said)


def as_built(described: Described, names: Names, base: Lender | None = None) -> Described:
    """With as many layers of the vision tower, and with such routed experts, as the files, or the base's, have."""
    config = described.config
    layers = vit_layers_run(names, described.vit_layers)
    if layers is None:
        layers = config.vit.num_layers if base is None else base.vit_layers
    decoder = with_routed(config.decoder, described.experts, names.pieces, () if base is None else base.stored)
    return replace(described, config=replace(config, vit=replace(config.vit, num_layers=layers), decoder=decoder))


def _complete(
    found: _Found, described: Described, table: Mapping[str, TensorSpec], base: Lender | None, configs: ConfigFiles
) -> None:
    """Fill what is missing: lm_head where it is the embedding, the base's tensors, and tables of positions."""
    if LM_HEAD not in found.stored and described.tied and EMBEDDING in found.stored:
        embedding = found.stored[EMBEDDING]
        found.stored[LM_HEAD] = replace(embedding, entry=replace(embedding.entry, name=LM_HEAD))
        found.lines["lm_head"] = "the embedding, as the configuration says (tie_word_embeddings)"
    elif LM_HEAD in found.stored and described.tied:
        found.lines["lm_head"] = "the file's own, though the configuration says that it is the embedding"
    lent: list[TensorSpec] = []
    for name, spec in table.items():
        if base is not None and name not in found.stored and name in base.stored:
            found.stored[name] = base.stored[name]
            lent.append(spec)
    if base is not None:
        found.lines["completed"] = _completed_line(base, lent, configs)
    computed = [name for name in POSITIONS if name not in found.stored and _used(found.stored, name, table)]
    for name in computed:
        found.stored[name] = _positions(name, described)
    found.lines["computed"] = ", ".join(computed)


def _completed_line(base: Lender, lent: list[TensorSpec], configs: ConfigFiles) -> str:
    said = "; ".join(part for part in (counted(lent), ", ".join(_lent_files(configs, base))) if part)
    return f"from {base.name}: {said or 'nothing was lacking'}"


def _lent_files(configs: ConfigFiles, base: Lender) -> list[str]:
    """Names of small files that the base lends."""
    lent = [name for name in base.configs.sections if name not in configs.sections]
    return lent + ([] if has_tokenizer(configs.small) else ["tokenizer"])


def _used(stored: Mapping[str, StoredTensor], name: str, table: Mapping[str, TensorSpec]) -> bool:
    """Whether there is anything that a table of positions would be used with."""
    part = part_of(table[name])
    return any(part_of(spec) == part for other, spec in table.items() if other != name and other in stored)


def _positions(name: str, described: Described) -> StoredTensor:
    """A table of positions as the published code makes it, for the largest picture that the rules give."""
    config = described.config
    drawn, seen = (config.vae_resize, config.token_pixels), (config.vit_resize, config.vit.patch_size)
    rule, token = drawn if name == LATENT_POSITIONS else seen
    side = min(described.sides.get(POSITIONS[name], MAX_SIDE), rule.max_side // token, MAX_SIDE)
    width = config.decoder.hidden_size
    if width % 4:
        raise ConfigError(f"{name} is missing, and cannot be computed for the hidden size {width}; give a --base")
    return StoredTensor.viewed(Sines(side), name, "BF16", (side * side, width))


def _dtypes(stored: Mapping[str, StoredTensor], table: Mapping[str, TensorSpec]) -> str:
    """How many of the model's tensors are not bf16, the VAE aside, which is kept as it is."""
    kinds = Counter(
        "FP8, read as bf16" if one.view is not None and one.view.encoding == "fp8" else one.entry.dtype
        for name, one in stored.items()
        if table[name].part != "vae"
    )
    others = {kind: count for kind, count in kinds.items() if kind != "BF16"}
    return ", ".join(f"{count} of {sum(kinds.values())} tensors {kind}" for kind, count in sorted(others.items()))


def _published(
    folder: Path, described: Described, format: str, files: list[TensorFile], names: Names, reading: Reading,
    configs: ConfigFiles, base: Lender | None,
) -> SourceFiles:  # fmt: skip
    """A published DFloat11 folder: the names in its files, which its layout explains, and the autoencoder's.

    A base lends what is around the decoder, which is never encoded.
    """
    path = vae_file(folder)
    pieces = dict(names.pieces)
    if path is not None:
        vae = open_tensors(path)
        files = [*files, vae]
        pieces |= Names.of([vae]).pieces
    stored = {name: StoredTensor.plain(piece.file, piece.entry, name) for name, piece in pieces.items()}
    if base is not None:
        around = [spec for spec in tensor_table(described.config).values() if spec.part in AROUND]
        lent = [spec for spec in around if spec.name not in stored and spec.name in base.stored]
        stored |= {spec.name: base.stored[spec.name] for spec in lent}
        reading = reading.joined(completed=_completed_line(base, lent, configs))
    return SourceFiles(described.config, format, files, stored, reading, configs)


def quantized_by(configs: ConfigFiles) -> str:
    """What a configuration says of a quantization, in a few words; empty where it says nothing."""
    for section in (configs.whole, *configs.sections.values()):
        quantization = None if section is None else section.values.get("quantization_config")
        if isinstance(quantization, Mapping):
            method = quantization.get("quant_method")
            return f"quantization_config {method if isinstance(method, str) else 'of an unnamed method'}"[:80]
    return ""


def _published_format(folder: Path) -> str:
    config = folder / "config.json"
    if config.exists() and "dfloat11_config" in read_json(config):
        return "dfloat11"
    return "source"
