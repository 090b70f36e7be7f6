"""How much memory a plan takes, phase by phase. Pure; no torch.

The activations are counted from the shapes of the tensors that are alive at the widest moments of `model.decoder`,
`model.vision` and `model.vae`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..checkpoint.config import BagelConfig, Routed, VaeConfig
from ..formats.spec import Around, Way
from ..ops.attention.spec import Call, Cost
from ..sampling.step_caches.base import StepCache
from ..sampling.step_caches.none import NONE
from ..settings import Task
from .attention import UNKNOWN_COST
from .calibration import Calibration
from .facts import ModelFacts

MARKERS = 2
STAGEABLE = ("embedding", "lm_head", "vit", "vae")
"""Parts that can wait in RAM, the cheapest to move first."""
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
MIB = 1 << 20
VAE_STRIP_VALUES = 1 << 25
"""Values of a feature map that `model.vae` works on at a time."""


@dataclass(frozen=True)
class ComputeConfig:
    """What memory and speed depend on of how a model is computed; dtypes are torch's names.

    `way` is how the decoder's linears are multiplied, and `around` what computes what surrounds that.
    `dense_swiglu`: dense products of many tokens end in SwiGLU.
    """

    device: str
    dtype: str
    residual_dtype: str
    vae_dtype: str
    attention: str
    way: Way
    around: Around
    dense_swiglu: bool = False
    attention_cost: Cost = UNKNOWN_COST

    @property
    def decoded_at_load(self) -> bool:
        return self.way.weights == "decoded at load"

    @property
    def int32_products(self) -> bool:
        return self.way.mlp == "int32 product"

    @property
    def swiglu_in_matmul(self) -> bool:
        """Whether what SwiGLU multiplies is never stored, for many tokens."""
        return self.dense_swiglu and self.way.products == "dense" and self.way.weights != "dequantized"

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def activation_itemsize(self) -> int:
        """float16 arithmetic keeps what is around the decoder's linears in float32 and scales it for each matmul."""
        return 4 if self.dtype == "float16" else self.itemsize


@dataclass(frozen=True)
class Workload:
    """What a request asks for, in tokens: derived from a `planner.Request` for one task."""

    task: Task
    grid: tuple[int, int]
    """Rows and columns of latent tokens; (0, 0) where no picture is drawn."""
    input_grids: Sequence[tuple[int, int]]
    """Latent grids of the input pictures."""
    vit_tokens: int
    """Tokens of one input picture's vision tower."""
    text_tokens: int
    new_tokens: int
    """Most tokens that are generated as text, an answer or a plan; of several texts of an answer all, with markers."""
    guided_branches: int
    guided_steps: int
    """Guided steps that are computed, not predicted by a step cache; likewise `steps`, all that are computed."""
    steps: int
    step_cache: StepCache = NONE
    stored_states: int = 0
    """Hidden states, or velocities, of the picture that the step cache of a branch holds at most."""
    own_branches: int | None = None
    """Branches that the device evaluates itself, where others evaluate the rest."""
    prefilled: int = 0
    """Tokens whose keys come from another device, or are there from earlier turns."""
    frames: int = 1
    """That are drawn together."""
    vit_each: Sequence[int] = ()
    """Tokens of each input picture's vision tower, where they differ; `vit_tokens` is the most."""
    turns: int = 1
    """Frames that are drawn one after the other: the last of the input grids are those of all but the last."""
    said: int = 0
    """Texts of an answer in texts and pictures, which are drawn between them: the last of the input grids are those of
    all its pictures. 0 of any other request."""
    kept_tokens: int = 0
    """Whose keys are copied for a next turn, beside the contexts."""

    @property
    def branches(self) -> int:
        """Of guidance, those that the device evaluates."""
        return self.guided_branches if self.own_branches is None else self.own_branches

    @cached_property
    def picture_tokens(self) -> int:
        """Of all frames that are drawn together."""
        return self.frames * (self.grid[0] * self.grid[1] + MARKERS) if self.grid[0] else 0

    @property
    def drawings(self) -> int:
        """Times that something is drawn, one after the other."""
        return self.said - 1 if self.said else self.turns

    @property
    def returned(self) -> int:
        """Pictures that were drawn and go back into the contexts."""
        return self.said - 1 if self.said else self.turns - 1

    @property
    def given(self) -> int:
        """Input pictures that were not drawn here."""
        return len(self.input_grids) - self.returned

    @cached_property
    def returned_tokens(self) -> int:
        """Of pictures that were drawn and that a context holds at last."""
        drawn = sum(rows * columns + MARKERS for rows, columns in self.input_grids[self.given :])
        return drawn + sum(tokens + MARKERS for tokens in self.seen_tokens[self.given :])

    @cached_property
    def seen_tokens(self) -> Sequence[int]:
        """Of each input picture's vision tower."""
        return self.vit_each or [self.vit_tokens] * len(self.input_grids)

    @cached_property
    def apart_tokens(self) -> int:
        """Of those, that the context without text holds once more. In an answer in texts and pictures that context is
        the full one before its last text."""
        return self.returned_tokens if self.guided_branches > 1 and not self.said else 0

    @property
    def encodes(self) -> bool:
        """Whether input pictures go through the autoencoder too."""
        return self.grid[0] > 0 or self.said > 0

    @cached_property
    def context_tokens(self) -> int:
        """Tokens of the full context when the last input is in it."""
        drawn = sum(rows * columns + MARKERS for rows, columns in self.input_grids) if self.encodes else 0
        return self.text_tokens + self.prefilled + drawn + sum(tokens + MARKERS for tokens in self.seen_tokens)

    @property
    def branch_tokens(self) -> dict[str, int]:
        """Tokens that each branch of guidance sees beside the picture."""
        full, text = self.context_tokens, self.context_tokens - self.text_tokens
        if self.said:
            full = text = self.context_tokens + self.new_tokens
        known = {"full": full, "text": text, "image": self.alone_tokens}
        return dict([*known.items()][: self.guided_branches])

    @property
    def alone_tokens(self) -> int:
        """Of the context of texts alone."""
        return self.text_tokens + (self.new_tokens if self.said else 0)

    @property
    def cached_tokens(self) -> int:
        side = self.alone_tokens if self.guided_branches > 2 else 0
        return side + self.apart_tokens + self.picture_tokens + self.context_tokens + self.new_tokens


@dataclass(frozen=True)
class PhaseNeed:
    """A stretch of a request: what it needs besides weights, in bytes, and the stageable parts that it uses."""

    name: str
    activations: int
    kv_cache: int
    parts: frozenset[str] = frozenset()

    def dynamic(self, slack: float) -> int:
        return self.kv_cache + int(self.activations * (1 + slack))


def phases(
    facts: ModelFacts, how: ComputeConfig, workload: Workload, batch: bool, calibration: Calibration,
    graph_tokens: int = 0,
) -> Iterator[PhaseNeed]:  # fmt: skip
    """The phases of a request in their order; `batch`: guidance branches run as one batch; `graph_tokens` is as of a
    plan."""
    c = facts.config
    kv_cache = kv_cache_bytes(c, how, workload.cached_tokens)
    workspace = 0 if how.device == "cpu" else calibration.convolution_bytes

    def layer(tokens: int, branches: int = 1) -> int:
        return pass_bytes(c, how, tokens, workload.cached_tokens, branches)

    def latent_positions(grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] * c.latent_patch, grid[1] * c.latent_patch

    if workload.input_grids and "vit" not in facts.left_out:
        if workload.encodes:
            largest = max(workload.input_grids, key=lambda grid: grid[0] * grid[1])
            vae = vae_encode_bytes(c.vae, *latent_positions(largest), ITEMSIZE[how.vae_dtype])
            yield PhaseNeed("encode", vae + workspace, kv_cache, frozenset({"vae"}))
        yield PhaseNeed("look", vit_bytes(c, how, workload.vit_tokens), kv_cache, frozenset({"vit"}))
    said = workload.new_tokens // workload.said if workload.said else 0
    longest = max([workload.text_tokens, said, *([workload.vit_tokens + MARKERS] if workload.input_grids else [])])
    if workload.encodes:
        longest = max([longest, *(rows * columns + MARKERS for rows, columns in workload.input_grids)])
    yield PhaseNeed("prefill", layer(longest), kv_cache)
    if workload.new_tokens:
        logits = 0 if "lm_head" in facts.left_out else c.decoder.vocab_size * 2 * 4
        yield PhaseNeed("text", layer(1) + logits, kv_cache, frozenset({"lm_head"}))
    if workload.picture_tokens:
        together = workload.branches if batch else 1
        kept = states_bytes(c, how, workload, together) + rope_bytes(c, workload, together)
        kept += graph_bytes(c, how, workload, together, graph_tokens)
        yield PhaseNeed("denoise", layer(workload.picture_tokens, together) + kept, kv_cache)
    if workload.picture_tokens and "vae" not in facts.left_out:
        decoded = vae_decode_bytes(c.vae, *latent_positions(workload.grid), ITEMSIZE[how.vae_dtype])
        yield PhaseNeed("decode", decoded + workspace, kv_cache if workload.returned else 0, frozenset({"vae"}))
    if workload.kept_tokens:
        yield PhaseNeed("keep", 0, kv_cache + kv_cache_bytes(c, how, workload.kept_tokens))


def states_bytes(config: BagelConfig, how: ComputeConfig, workload: Workload, together: int) -> int:
    """Hidden states and velocities of the picture alive in `sampling.denoise` while a layer computes, of all branches.

    `together` of the branches are in the pass. What a cache does between passes takes less than a layer does.
    """
    branches, cache = workload.branches, workload.step_cache
    waiting = 0 if cache.holds_result else branches - together  # what the branches before gave
    hidden = hidden_bytes(config, how, workload)
    stored = hidden if cache.predicts == "hidden states" else velocity_bytes(config, workload)
    return branches * workload.stored_states * stored + (waiting + cache.pending * together) * hidden


def graph_bytes(config: BagelConfig, how: ComputeConfig, workload: Workload, together: int, graph_tokens: int) -> int:
    """What `sampling.pass_graphs` takes beside the layer that is launched: torch keeps the memory of each stream and of
    each graph apart, so a layer's activations once for the stream of the capture and once for the graphs."""
    together = next((count for count in (together, 1) if count * workload.picture_tokens <= graph_tokens), 0)
    if not together:
        return 0
    layer = pass_bytes(config, how, workload.picture_tokens, workload.cached_tokens, together)
    return 2 * layer + 3 * together * hidden_bytes(config, how, workload)


def rope_bytes(config: BagelConfig, workload: Workload, together: int) -> int:
    """Cosines and sines of frames, whose tokens differ in them."""
    tokens = workload.picture_tokens * together if workload.frames > 1 else 0
    return 2 * tokens * config.decoder.head_dim * ITEMSIZE["float32"]


def hidden_bytes(config: BagelConfig, how: ComputeConfig, workload: Workload) -> int:
    """Hidden states of one branch's picture."""
    return workload.picture_tokens * config.decoder.hidden_size * ITEMSIZE[how.residual_dtype]


def velocity_bytes(config: BagelConfig, workload: Workload) -> int:
    """A velocity of one branch's picture."""
    tokens = workload.frames * workload.grid[0] * workload.grid[1]
    return tokens * config.latent_values * ITEMSIZE["float32"]


def kv_cache_bytes(config: BagelConfig, how: ComputeConfig, tokens: int) -> int:
    """Keys and values of all layers."""
    d = config.decoder
    return 2 * d.num_layers * tokens * d.num_kv_heads * d.head_dim * how.itemsize


def pass_bytes(config: BagelConfig, how: ComputeConfig, tokens: int, keys: int, branches: int = 1) -> int:
    """Activations of `layer_bytes`, with the weights that are dequantised where these are widest.

    One token is multiplied by the packed weights, but by PyTorch's operations.
    """
    if how.way.weights != "dequantized" or (tokens * branches == 1 and how.around != "torch"):
        return layer_bytes(config, how, tokens, keys, branches)
    h, m = config.decoder.hidden_size, config.decoder.intermediate_size
    if config.decoder.routed is not None:
        m = max(m, config.decoder.routed.stacked)
    item = how.itemsize
    at_down = layer_bytes(config, how, tokens, keys, branches) + m * h * item
    at_gate_up = layer_bytes(config, how, tokens, keys, branches, until_gate_up=True) + 2 * m * h * item
    return max(at_down, at_gate_up) + how.way.scratch


def layer_bytes(
    config: BagelConfig, how: ComputeConfig, tokens: int, keys: int, branches: int = 1, until_gate_up: bool = False
) -> int:
    """Activations at the widest moment of a decoder layer, for `tokens` new tokens in each of `branches`.

    `until_gate_up`: as far as what the MLP's first product gives.
    """
    d = config.decoder
    h, m, qkv = d.hidden_size, d.intermediate_size, sum(d.qkv_rows)
    item, residual = how.activation_itemsize, ITEMSIZE[how.residual_dtype]
    # Alive until the layer ends: what entered the pass, the layer's input, q, k and v, and what attention gave.
    scaled = how.dtype == "float16" and not how.int32_products
    in_place = how.around == "cuda" or scaled or (how.around == "triton" and how.way.adds)
    held = (1 if in_place else 2) * h * residual + (qkv + h) * how.itemsize
    attending = held
    # Inside the MLP: the new residual stream, and what the MLP makes.
    around = held + (0 if in_place else h * residual) + (h * item if how.dtype == "float16" else 0)
    mlp = around + (h if how.swiglu_in_matmul else 2 * m) * item + (0 if until_gate_up else _after_gate_up(how, m))
    if d.routed is not None:
        mlp = max(mlp, around + _routed_bytes(how, d.routed, h, until_gate_up))
    widest = max(mlp, attending) * tokens * branches
    return max(widest, attending * tokens * branches + attention_bytes(config, how, tokens, keys))


def _routed_bytes(how: ComputeConfig, routed: Routed, hidden: int, until_gate_up: bool) -> int:
    """What routed experts make of a token: what they read, gate and up, what becomes of them, and each one's result."""
    item, size = how.activation_itemsize, routed.size
    activated = size * (1 if how.way.mlp == "int8 values" else item)
    made = max(_after_gate_up(how, size), activated + hidden * item)
    return hidden * item + routed.active * (2 * size * item + (0 if until_gate_up else made))


def _after_gate_up(how: ComputeConfig, width: int) -> int:
    """What becomes of gate and up, a token."""
    item = how.activation_itemsize
    if how.way.mlp == "int8 values":
        return width
    if how.around == "torch":  # silu(gate), by PyTorch's operations, and its product with up
        return 2 * width * item
    return width * item + (2 * width * (4 - item) if how.int32_products else 0)


def attention_bytes(config: BagelConfig, how: ComputeConfig, tokens: int, keys: int) -> int:
    """Workspace of attention beside q, k, v and its result; branches take turns."""
    d = config.decoder
    call = Call(tokens, keys, d.num_heads, d.num_kv_heads, d.head_dim, how.itemsize)
    return how.attention_cost.scratch(call)


def scratch_bytes(facts: ModelFacts, how: ComputeConfig) -> int:
    """Device memory that linears decode into, all the time: the largest fused linear. What is dequantised for one
    product alone is in `pass_bytes`."""
    if how.way.weights == "dequantized":
        return 0
    d = facts.config.decoder
    middle = max(d.intermediate_size, 0 if d.routed is None else d.routed.stacked)
    largest = 2 * middle * d.hidden_size * how.itemsize
    return how.way.scratch + (largest if how.way.weights == "decoded at use" else 0)


def vit_bytes(config: BagelConfig, how: ComputeConfig, tokens: int) -> int:
    """The vision tower: input, normed, q, k, v and result, or the MLP's two wide tensors; then the connector."""
    v, item = config.vit, how.activation_itemsize
    block = v.hidden_size * 3 + max(4 * v.hidden_size, 2 * v.intermediate_size)
    return tokens * max(block, v.hidden_size + 3 * config.decoder.hidden_size) * item


def vae_decode_bytes(c: VaeConfig, rows: int, columns: int, itemsize: int) -> int:
    """The autoencoder's decoder on rows x columns latent positions: the widest of its steps, workspaces aside."""
    widest = 0
    area, width = rows * columns, c.ch * c.ch_mult[-1]
    for level in reversed(range(len(c.ch_mult))):
        out = c.ch * c.ch_mult[level]
        widest = max(widest, _level_bytes(area, width, out, c.num_res_blocks + 1, itemsize))
        if level:
            upsampled = area * 5 * out * itemsize + 3 * itemsize * min(4 * area * out, VAE_STRIP_VALUES)
            widest, area = max(widest, upsampled), 4 * area
        width = out
    return widest


def vae_encode_bytes(c: VaeConfig, rows: int, columns: int, itemsize: int) -> int:
    """The autoencoder's encoder on a picture of rows x columns latent positions, workspaces aside."""
    widest = 0
    area, width = rows * columns * c.downsample**2, c.ch
    for level, mult in enumerate(c.ch_mult):
        out = c.ch * mult
        widest = max(widest, _level_bytes(area, width, out, c.num_res_blocks, itemsize))
        if level < len(c.ch_mult) - 1:
            widest = max(widest, (area * 2 * out + area // 4 * out) * itemsize)
            area //= 4
        width = out
    return widest


def _level_bytes(area: int, width: int, out: int, blocks: int, itemsize: int) -> int:
    """A level's residual blocks on `area` positions; maps are normalised in strips, each once in float32."""

    def convolving(channels: int) -> int:
        values = area * channels
        return VAE_STRIP_VALUES * (4 + 2 * itemsize) if values > VAE_STRIP_VALUES else 2 * values * itemsize

    first = area * (width + 2 * out) * itemsize + max(convolving(width) - area * out * itemsize, convolving(out))
    later = area * 3 * out * itemsize + convolving(out)
    return max(first, later) if blocks > 1 else first


def base_bytes(how: ComputeConfig, calibration: Calibration) -> int:
    """What the process takes of its device before any weight: the CUDA context, or the interpreter's RAM."""
    if how.device == "cpu":
        return calibration.cpu_process_bytes
    return calibration.context_bytes + calibration.workspace_bytes


def part_bytes(facts: ModelFacts, how: ComputeConfig, part: str) -> int:
    """Bytes of a stageable part in the form in which it is used."""
    if part == "embedding":
        return facts.embedding * how.itemsize
    if part == "lm_head":
        return facts.lm_head.nbytes(how.itemsize, how.decoded_at_load)
    if part == "vit":
        return facts.vision * how.activation_itemsize
    assert part == "vae", part
    return facts.vae * ITEMSIZE[how.vae_dtype]
