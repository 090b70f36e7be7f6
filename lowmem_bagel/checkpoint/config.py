"""The model's dimensions and limits, read from the JSON files of a checkpoint folder. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import parse_json, read_file

PUBLISHED_MAX_PIXELS = 1806336
"""Pixels above which upstream's resize rule shrinks a picture (14 * 14 * 9 * 1024)."""
MAX_LAYERS = 1000
"""Of any stack: far above every real model, and few enough that a damaged file cannot fill the memory with names."""


@dataclass(frozen=True)
class DecoderConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the q, k and v parts of the fused projection."""
        kv = self.num_kv_heads * self.head_dim
        return self.hidden_size, kv, kv


@dataclass(frozen=True)
class VitConfig:
    hidden_size: int
    num_layers: int
    """Layers present in the checkpoint: one fewer than `vit_config.json` says."""
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        """Side of the learned position table, and the stride of its row index."""
        return self.image_size // self.patch_size

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class VaeConfig:
    """FLUX's autoencoder; the defaults are the published one's constants."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsample(self) -> int:
        return 1 << (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class ResizeRule:
    """Limits in pixels for the longest and shortest side, and the multiple that both sides are rounded to."""

    max_side: int
    min_side: int
    stride: int
    max_pixels: int = PUBLISHED_MAX_PIXELS

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels after upstream's resize rule. Rounding is Python's, half to even."""
        scale = max(min(self.max_side / max(width, height), 1.0), self.min_side / min(width, height))
        width, height = self._scaled(width, height, scale)
        if width * height > self.max_pixels:
            width, height = self._scaled(width, height, self.max_pixels / (width * height))
        if max(width, height) > self.max_side:
            width, height = self._scaled(width, height, self.max_side / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        wide, high = (max(1, round(round(side * scale) / self.stride)) * self.stride for side in (width, height))
        return wide, high


@dataclass(frozen=True)
class BagelConfig:
    decoder: DecoderConfig
    vit: VitConfig
    vae: VaeConfig
    vae_resize: ResizeRule = ResizeRule(1024, 512, 16)
    vit_resize: ResizeRule = ResizeRule(980, 224, 14)
    latent_patch: int = 2
    """A latent token is latent_patch x latent_patch positions of the VAE's latent."""

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that one latent token stands for."""
        return self.latent_patch * self.vae.downsample

    @property
    def latent_values(self) -> int:
        """Numbers in one latent token."""
        return self.latent_patch**2 * self.vae.z_channels

    @classmethod
    def from_folder(cls, folder: Path) -> BagelConfig:
        """Read `llm_config.json`, `vit_config.json` and, where present, `ae_config.json` and `resize_config.json`.

        Raises:
            CheckpointError: the folder or a required file is missing or is not JSON.
            ConfigError: a value is missing, of the wrong type, or one that BAGEL's architecture excludes.
        """
        if not folder.is_dir():
            raise CheckpointError(f"no such folder: {folder}; give a BAGEL checkpoint or variant folder")
        llm = _Section(folder / "llm_config.json")
        vit = _Section(folder / "vit_config.json")
        decoder = DecoderConfig(
            hidden_size=llm.integer("hidden_size"),
            num_layers=llm.integer("num_hidden_layers", maximum=MAX_LAYERS),
            num_heads=llm.integer("num_attention_heads"),
            num_kv_heads=llm.integer("num_key_value_heads"),
            intermediate_size=llm.integer("intermediate_size"),
            vocab_size=llm.integer("vocab_size"),
            rope_theta=llm.number("rope_theta", 1e6),
            rms_norm_eps=llm.number("rms_norm_eps", 1e-6),
        )
        if decoder.hidden_size % decoder.num_heads or decoder.num_heads % decoder.num_kv_heads:
            raise ConfigError(
                f"{llm.path}: hidden_size must be a multiple of num_attention_heads, "
                "and that a multiple of num_key_value_heads"
            )
        if decoder.head_dim % 2:
            raise ConfigError(f"{llm.path}: the head size {decoder.head_dim} is odd; rope needs an even one")
        vision = VitConfig(
            hidden_size=vit.integer("hidden_size"),
            num_layers=vit.integer("num_hidden_layers", minimum=2, maximum=MAX_LAYERS) - 1,
            num_heads=vit.integer("num_attention_heads"),
            intermediate_size=vit.integer("intermediate_size"),
            patch_size=vit.integer("patch_size"),
            image_size=vit.integer("image_size"),
            layer_norm_eps=vit.number("layer_norm_eps", 1e-6),
        )
        if vision.hidden_size % vision.num_heads:
            raise ConfigError(f"{vit.path}: hidden_size must be a multiple of num_attention_heads")
        vae = _read_vae(folder / "ae_config.json")
        vae_resize, vit_resize = _read_resize(folder / "resize_config.json")
        config = cls(decoder, vision, vae, vae_resize, vit_resize)
        _check_rule(folder, "vae", vae_resize, config.token_pixels)
        _check_rule(folder, "vit", vit_resize, vision.patch_size)
        if vit_resize.max_side > vision.image_size:
            raise ConfigError(
                f"{vit.path}: image_size {vision.image_size} is under the {vit_resize.max_side} pixels that pictures "
                "are resized to; correct it, or give lower limits in resize_config.json"
            )
        return config


BAGEL_7B = BagelConfig(
    DecoderConfig(3584, 28, 28, 4, 18944, 152064, 1e6, 1e-6),
    VitConfig(1152, 26, 16, 4304, 14, 980, 1e-6),
    VaeConfig(),
)
"""The published model."""


def _read_vae(path: Path) -> VaeConfig:
    if not path.exists():
        return VaeConfig()
    ae = _Section(path)
    mult = ae.values.get("ch_mult")
    if not isinstance(mult, list) or not 1 <= len(mult) <= 8 or not all(type(m) is int and m > 0 for m in mult):
        raise ConfigError(f"{path}: ch_mult must be a list of 1 to 8 positive whole numbers")
    return VaeConfig(
        in_channels=ae.integer("in_channels", 3),
        out_ch=ae.integer("out_ch", 3),
        ch=ae.integer("ch"),
        ch_mult=tuple(mult),
        num_res_blocks=ae.integer("num_res_blocks", maximum=MAX_LAYERS),
        z_channels=ae.integer("z_channels"),
        scale_factor=ae.number("scale_factor"),
        shift_factor=ae.number("shift_factor"),
    )


def _check_rule(folder: Path, name: str, rule: ResizeRule, token: int) -> None:
    """Sides that the rule gives must be whole tokens, and none may be longer than max_side."""
    if rule.stride % token or rule.max_side % rule.stride or not rule.stride <= rule.min_side <= rule.max_side:
        raise ConfigError(
            f"{folder / 'resize_config.json'}: {name}: stride must be a multiple of the {token} pixels of a token, "
            "max_side one of stride, and min_side between the two"
        )


def _read_resize(path: Path) -> tuple[ResizeRule, ResizeRule]:
    if not path.exists():
        return BagelConfig.vae_resize, BagelConfig.vit_resize
    section = _Section(path)
    rules = []
    for name in ("vae", "vit"):
        rule = _Section(path, section.values.get(name), name)
        rules.append(ResizeRule(rule.integer("max_side"), rule.integer("min_side"), rule.integer("stride")))
    return rules[0], rules[1]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        CheckpointError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        values = parse_json(read_file(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; is this a BAGEL checkpoint folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); put it in its place") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error}); download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, not a JSON object; download it again")
    return values


class _Section:
    """Typed reading of one JSON object, with errors that name the file and the key."""

    def __init__(self, path: Path, values: object | None = None, name: str = "") -> None:
        self.path = path
        self.where = f"{path}: {name}." if name else f"{path}: "
        if values is None and not name:
            values = read_json(path)
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: {name or 'the file'} must be a JSON object")
        self.values: Mapping[str, Any] = values

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            raise ConfigError(f"{self.where}{key} must be a whole number from {minimum} to {maximum}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not abs(value) < 1e12:
            raise ConfigError(f"{self.where}{key} must be a number, not {value!r}")
        return float(value)
