"""Where a model's configuration stands, and what it says.

The published folder has `llm_config.json` and `vit_config.json`. What `save_pretrained` writes has both, nested, in
`config.json`. A single file for ComfyUI has them in its metadata. A fine-tune may leave them to the folder that it was
made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import parse_json
from . import arithmetic
from .config import BAGEL_7B, MAX_LAYERS, BagelConfig, DecoderConfig, ResizeRule, VaeConfig, VitConfig
from .routed import Said, read_said
from .sections import Section
from .small_files import SmallFiles

LLM, VIT, AE, RESIZE, WHOLE = (
    "llm_config.json",
    "vit_config.json",
    "ae_config.json",
    "resize_config.json",
    "config.json",
)
NESTED: Mapping[str, tuple[str, ...]] = {
    LLM: ("llm_config", "text_config", "language_config"),
    VIT: ("vit_config", "vision_config"),
    AE: ("vae_config", "ae_config"),
    RESIZE: ("resize_config",),
}
"""What a file's content is called where it stands in another object."""
COMFY = "comfyui_bagel"
"""Key of the metadata of a single file for ComfyUI."""
VAE_FOLDER_CONFIG = "vae/config.json"
SIZES = {"latent": "max_latent_size", "vit": "vit_max_num_patch_per_side"}
"""Sides of the position tables, where the configuration says them."""


@dataclass(frozen=True)
class ConfigFiles:
    """The objects that describe a model: `sections` by the file's name of the published layout, `whole` for what
    stands around them. `special_ids` are ids of special tokens that the model was made with, by token. `small`: where
    they and the tokenizer are."""

    folder: Path
    sections: Mapping[str, Section]
    whole: Section | None = None
    special_ids: Mapping[str, int] | None = None
    held: Mapping[str, str] = field(default_factory=dict)

    @property
    def small(self) -> SmallFiles:
        return SmallFiles(self.folder, self.held)

    def completed(self, base: ConfigFiles | None) -> ConfigFiles:
        """With what only the base has."""
        if base is None:
            return self
        return replace(self, sections={**base.sections, **self.sections}, whole=self.whole or base.whole)


@dataclass(frozen=True)
class Described:
    """What configuration files say. `vit_layers` is the number that they give for the vision tower, whose last layer
    is not used where it counts a whole SigLIP; `sides` are those of position tables, where given; `experts` is what is
    said of routed ones, which only the weights show."""

    config: BagelConfig
    vit_layers: int
    tied: bool
    sides: Mapping[str, int]
    experts: Said


def gather(folder: Path, metadata: Mapping[str, str] | None = None) -> ConfigFiles:
    """The configuration that lies in a folder and in the metadata of its weights.

    Raises:
        CheckpointError, ConfigError: the folder is missing, or a file is no JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder}; give a BAGEL checkpoint or variant folder")
    small = SmallFiles.of(folder, metadata or {})
    whole = _file(small, WHOLE)
    comfy = comfy_metadata(folder, metadata or {})
    sections: dict[str, Section] = {}
    for name, nested in NESTED.items():
        own = _file(small, name)
        inside = whole.inside(*nested) if whole is not None else None
        if own is not None and inside is not None:
            _check_agreement(name, own, inside)
        section = (comfy.inside(*nested) if comfy is not None else None) or own or inside
        if section is not None:
            sections[name] = section
    vae = _file(small, VAE_FOLDER_CONFIG)
    if AE not in sections and vae is not None:
        sections[AE] = vae
    elif vae is not None:
        _check_autoencoders(sections[AE], vae)
    if VIT in sections and "hidden_size" not in sections[VIT].values:  # SigLIP's own file, of text and vision
        sections[VIT] = sections[VIT].inside("vision_config") or sections[VIT]
    return ConfigFiles(folder, sections, whole, None if comfy is None else _special_ids(comfy), small.held)


def config_of(folder: Path) -> BagelConfig:
    """The configuration that a folder's small files describe, whatever tensors there are.

    Raises:
        CheckpointError, ConfigError: as for `gather` and `read_config`.
    """
    return read_config(gather(folder)).config


def read_config(files: ConfigFiles, tower: bool = True) -> Described:
    """The dimensions and limits that the objects describe; without a vision `tower` the published one's stand for it.

    Raises:
        CheckpointError: one that is required is missing.
        ConfigError: a value is missing, of the wrong type, or one that BAGEL's architecture excludes.
    """
    llm = _required(files, LLM)
    vit = _required(files, VIT) if tower or VIT in files.sections else None
    whole = files.whole or Section(files.folder / WHOLE, {})
    arithmetic.check_fixed(whole, arithmetic.WHOLE)
    decoder = _decoder(llm)
    vision, vit_layers = (BAGEL_7B.vit, BAGEL_7B.vit.num_layers + 1) if vit is None else _vision(vit)
    vae = _vae(files.sections.get(AE))
    vae_resize, vit_resize = _resize(files.sections.get(RESIZE))
    config = BagelConfig(
        decoder, vision, vae, vae_resize, vit_resize, whole.integer("latent_patch_size", BagelConfig.latent_patch)
    )
    _check_rule(files.folder, "vae", vae_resize, config.token_pixels)
    _check_rule(files.folder, "vit", vit_resize, vision.patch_size)
    if vit_resize.max_side > vision.image_size:
        where = vit.where if vit is not None else f"{files.folder / RESIZE}: "
        raise ConfigError(
            f"{where}image_size {vision.image_size} is under the {vit_resize.max_side} pixels that pictures "
            "are resized to; correct it, or give lower limits in resize_config.json"
        )
    sides = {part: whole.integer(key, maximum=1 << 12) for part, key in SIZES.items() if key in whole.values}
    return Described(config, vit_layers, arithmetic.tied(llm, whole), sides, read_said(llm))


def comfy_metadata(folder: Path, metadata: Mapping[str, str]) -> Section | None:
    """What a single file for ComfyUI says of itself."""
    text = metadata.get(COMFY)
    if text is None:
        return None
    where = folder / f"metadata of the weights, {COMFY}"
    try:
        return Section(where, parse_json(text.encode()))
    except ValueError as error:
        raise CheckpointError(
            f"{where}: not a readable JSON object ({error}); give the configuration by --base"
        ) from error


def says_to_be(whole: Section | None) -> str | None:
    """What a config.json that describes another model calls it; None where it may be BAGEL."""
    if whole is None:
        return None
    architectures = whole.values.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    kind = whole.values.get("model_type")
    words = [*([kind] if isinstance(kind, str) and kind else []), *names]
    if not words or any("bagel" in word.lower() for word in words):
        return None
    return " ".join(words)[:100]


def _file(small: SmallFiles, name: str) -> Section | None:
    return Section(small.where(name), small.json(name)) if small.has(name) else None


def _required(files: ConfigFiles, name: str) -> Section:
    if name in files.sections:
        return files.sections[name]
    other = says_to_be(files.whole)
    if other is not None:
        raise CheckpointError(f"{files.folder}: config.json says that this is {other}, not BAGEL")
    above = files.folder.parent if (files.folder.parent / name).is_file() else None
    raise CheckpointError(
        f"{files.folder}: {name} is missing; is this a BAGEL checkpoint folder? What it lacks is taken from the "
        f"checkpoint that it was made from with --base {above or 'FOLDER'}"
    )


AGREEING: Mapping[str, tuple[str, ...]] = {
    LLM: (*arithmetic.EPS, *arithmetic.THETA, *arithmetic.ROPE, "hidden_act", "qk_norm", "hidden_size"),
    VIT: (*arithmetic.VIT_EPS, "hidden_act", "hidden_size", "rope"),
    AE: ("scale_factor", "shift_factor", "ch"),
    RESIZE: (),
}
"""What must not be said differently in two places, because it changes the numbers."""


def _check_agreement(name: str, own: Section, inside: Section) -> None:
    for key in AGREEING[name]:
        one, other = own.values.get(key), inside.values.get(key)
        if one is not None and other is not None and one != other:
            raise ConfigError(
                f"{own.where}{key} is {str(one)[:60]}, and {inside.where}{key} is {str(other)[:60]}; "
                "keep the one that holds"
            )


def _check_autoencoders(own: Section, diffusers: Section) -> None:
    """The scale and the shift of latents must not be said differently beside a VAE in a folder of its own."""
    for key, other in (("scale_factor", "scaling_factor"), ("shift_factor", "shift_factor")):
        one, two = own.values.get(key), diffusers.values.get(other)
        if one is not None and two is not None and one != two:
            raise ConfigError(f"{own.where}{key} is {one!r}, and {diffusers.where}{other} is {two!r}; keep one file")


def _decoder(llm: Section) -> DecoderConfig:
    decoder = DecoderConfig(
        hidden_size=llm.integer("hidden_size"),
        num_layers=llm.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=llm.integer("num_attention_heads"),
        num_kv_heads=llm.integer("num_key_value_heads"),
        intermediate_size=llm.integer("intermediate_size"),
        vocab_size=llm.integer("vocab_size"),
        rope_theta=arithmetic.rope_theta(llm),
        rms_norm_eps=arithmetic.eps(llm, arithmetic.EPS, arithmetic.RMS_NORM_EPS),
    )
    if decoder.hidden_size % decoder.num_heads or decoder.num_heads % decoder.num_kv_heads:
        raise ConfigError(
            f"{llm.where}hidden_size must be a multiple of num_attention_heads, "
            "and that a multiple of num_key_value_heads"
        )
    if decoder.head_dim % 2:
        raise ConfigError(f"{llm.where}the head size {decoder.head_dim} is odd; rope needs an even one")
    arithmetic.check_layers(llm, decoder.head_dim)
    return decoder


def _vision(vit: Section) -> tuple[VitConfig, int]:
    """The tower as the published file counts it, one layer fewer than it says; and what it says."""
    layers = vit.integer("num_hidden_layers", minimum=2, maximum=MAX_LAYERS)
    vision = VitConfig(
        hidden_size=vit.integer("hidden_size"),
        num_layers=layers - 1,
        num_heads=vit.integer("num_attention_heads"),
        intermediate_size=vit.integer("intermediate_size"),
        patch_size=vit.integer("patch_size"),
        image_size=vit.integer("image_size"),
        layer_norm_eps=arithmetic.eps(vit, arithmetic.VIT_EPS, arithmetic.LAYER_NORM_EPS),
    )
    if vision.hidden_size % vision.num_heads:
        raise ConfigError(f"{vit.where}hidden_size must be a multiple of num_attention_heads")
    arithmetic.check_fixed(vit, arithmetic.VIT)
    return vision, layers


def _vae(ae: Section | None) -> VaeConfig:
    if ae is None:
        return VaeConfig()
    arithmetic.check_fixed(ae, arithmetic.VAE)
    ch, mult = _channels(ae)
    vae = VaeConfig(
        in_channels=ae.integer("in_channels", VaeConfig.in_channels),
        out_ch=ae.spelled(("out_ch", "out_channels"), ae.integer, VaeConfig.out_ch),
        ch=ch,
        ch_mult=mult,
        num_res_blocks=ae.spelled(
            ("num_res_blocks", "layers_per_block"),
            lambda name: ae.integer(name, maximum=MAX_LAYERS),
            VaeConfig.num_res_blocks,
        ),
        z_channels=ae.spelled(("z_channels", "latent_channels"), ae.integer, VaeConfig.z_channels),
        scale_factor=ae.spelled(("scale_factor", "scaling_factor"), ae.number, VaeConfig.scale_factor),
        shift_factor=ae.spelled(("shift_factor",), ae.number, VaeConfig.shift_factor),
    )
    if not vae.scale_factor:
        raise ConfigError(f"{ae.where}scale_factor must not be 0")
    ae.only("downsample", (vae.downsample,), f"its ch_mult makes {vae.downsample}")
    return vae


def _channels(ae: Section) -> tuple[int, tuple[int, ...]]:
    """Channels of the first level, and how many times as many each level has."""
    widths = ae.values.get("block_out_channels")  # diffusers
    mult = ae.values.get("ch_mult", list(VaeConfig.ch_mult))
    if widths is not None and "ch_mult" not in ae.values:
        if not _whole_numbers(widths) or any(width % widths[0] for width in widths):
            raise ConfigError(f"{ae.where}block_out_channels must be 1 to 8 multiples of the first")
        return widths[0], tuple(width // widths[0] for width in widths)
    if not _whole_numbers(mult):
        raise ConfigError(f"{ae.where}ch_mult must be a list of 1 to 8 positive whole numbers")
    return ae.integer("ch", VaeConfig.ch), tuple(mult)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and 1 <= len(values) <= 8 and all(type(n) is int and n > 0 for n in values)


def _resize(section: Section | None) -> tuple[ResizeRule, ResizeRule]:
    if section is None:
        return BagelConfig.vae_resize, BagelConfig.vit_resize
    vae, vit = (Section(section.path, section.values.get(name), name) for name in ("vae", "vit"))
    return _rule(vae), _rule(vit)


def _rule(section: Section) -> ResizeRule:
    return ResizeRule(section.integer("max_side"), section.integer("min_side"), section.integer("stride"))


def _check_rule(folder: Path, name: str, rule: ResizeRule, token: int) -> None:
    """Sides that the rule gives must be whole tokens, and none may be longer than max_side."""
    if rule.stride % token or rule.max_side % rule.stride or not rule.stride <= rule.min_side <= rule.max_side:
        raise ConfigError(
            f"{folder / RESIZE}: {name}: stride must be a multiple of the {token} pixels of a token, "
            "max_side one of stride, and min_side between the two"
        )


SPECIAL_NAMES: Mapping[str, str] = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}
"""What the published code calls the ids of special tokens."""


def _special_ids(comfy: Section) -> dict[str, int]:
    """Ids of BAGEL's special tokens, by token, from whatever object or list names them."""
    tokens = set(SPECIAL_NAMES.values())
    found: dict[str, int] = {}
    for key, section in comfy.values.items():
        for name, value in _named_ids(section if "token" in key else None):
            token = SPECIAL_NAMES.get(name, name)
            if token in tokens:
                found[token] = value
    return found


def _named_ids(section: object) -> Iterator[tuple[str, int]]:
    if isinstance(section, Mapping):
        yield from ((name, value) for name, value in section.items() if type(value) is int)
