"""The model's dimensions and limits, read from the JSON files of a checkpoint folder. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import parse_json, read_file
from .first_bytes import said_instead

PUBLISHED_MAX_PIXELS = 1806336
"""Pixels above which upstream's resize rule shrinks a picture (14 * 14 * 9 * 1024)."""
MAX_LAYERS = 1000
"""Of any stack: far above every real model, and few enough that a damaged file cannot fill the memory with names."""


@dataclass(frozen=True)
class Routed:
    """Gen MLPs that are cut into many experts, a few of which a router takes for each token (BAGEL-MoE).

    count: how many a layer has. active: how many of them a token goes through. size: intermediate size of each.
    layers: which have them; the other layers' MLPs are whole.
    """

    count: int
    active: int
    size: int
    layers: frozenset[int]

    @property
    def stacked(self) -> int:
        """Intermediate size of all experts together."""
        return self.count * self.size


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
    routed: Routed | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def routed_in(self, layer: int, expert: str) -> Routed | None:
        """The routed experts of a layer's MLP; None where it is whole."""
        routed = self.routed
        return routed if routed is not None and expert == "gen" and layer in routed.layers else None

    def multiplied(self, expert: str) -> int:
        """Weights of all layers' linears that a token of und or gen is multiplied by."""
        attention = sum(self.qkv_rows) + self.hidden_size
        whole = self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)
        routed = self.routed
        if routed is None or expert != "gen":
            return whole
        spared = 3 * (self.intermediate_size - routed.active * routed.size) - routed.count
        return whole - len(routed.layers) * self.hidden_size * spared

    def routed_values(self, expert: str) -> int:
        """Those of them that are parts of stacked weights."""
        if self.routed is None or expert != "gen":
            return 0
        return len(self.routed.layers) * 3 * self.hidden_size * self.routed.active * self.routed.size

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the q, k and v parts of the fused projection."""
        kv = self.num_kv_heads * self.head_dim
        return self.hidden_size, kv, kv


@dataclass(frozen=True)
class VitConfig:
    hidden_size: int
    num_layers: int
    """Layers that are run: one fewer than the published `vit_config.json` says."""
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


BAGEL_7B = BagelConfig(
    DecoderConfig(3584, 28, 28, 4, 18944, 152064, 1e6, 1e-6),
    VitConfig(1152, 26, 16, 4304, 14, 980, 1e-6),
    VaeConfig(),
)
"""The published model."""
BAGEL_MOE_7B = replace(BAGEL_7B, decoder=replace(BAGEL_7B.decoder, routed=Routed(16, 8, 1184, frozenset(range(1, 27)))))
"""BAGEL-MoE-7B-GEN-16to8."""


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
        raise CheckpointError(f"{path}: not a readable JSON file: {said_instead(path) or error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, not a JSON object; take the model's own file")
    return values
