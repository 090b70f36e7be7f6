"""How long a plan takes: arithmetic against copies, from the card's rates. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..checkpoint.adapters import Beside
from ..checkpoint.config import VaeConfig
from ..checkpoint.tensors import EXPERTS, Expert
from ..hardware.gpu_specs import Card, find_card
from ..hardware.profile import GIB, HardwareProfile
from .calibration import Calibration
from .facts import ModelFacts
from .memory import MARKERS, ComputeConfig, Workload, part_bytes
from .plan import Place

PICTURE_EXPERTS = frozenset(EXPERTS)
TEXT_EXPERTS: frozenset[Expert] = frozenset({"und"})
SLOWER_HOST = 1.5
"""How many times longer than measured a host may take to launch: passes up to where that is the bound are replayed."""


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second.

    `assumptions` says in words what was not measured on the machine itself, by what it concerns: "card", "copies",
    "disk" or "processor".
    """

    linear: float
    attention: float
    convolution: float
    vision: float
    memory: float
    decode: float
    """Bytes of weights that DFloat11 decoding writes."""
    copy: Mapping[Place, float]
    """Bytes a second from each place to the device."""
    grouped: float
    """Of `linear`, what products of routed experts reach."""
    prepared_pixels: float
    """Of input pictures, made ready by the host."""
    layer_seconds: float = 0.0
    """What an expert's layer takes beside its arithmetic, however few the tokens; on a card it hides behind kernels."""
    launch_seconds: float = 0.0
    """What a layer takes at least, however few the tokens, where it does."""
    token_layer_seconds: float = 0.0
    """What a layer of one token takes at least, where text is not decoded by a graph."""
    graph_layer_seconds: float = 0.0
    """What a layer of one token takes beside reading its weights, where it is."""
    token_share: Mapping[str, float] = field(default_factory=dict)
    """Of `memory`, what weights are read with to be multiplied by one token, by format."""
    assumptions: Mapping[str, str] = field(default_factory=dict)


def rates(profile: HardwareProfile, how: ComputeConfig, calibration: Calibration) -> Rates:
    """Rates of a machine for this arithmetic."""
    if how.device == "cpu":
        return _cpu_rates(profile, how, calibration)
    assert profile.capability is not None
    match = find_card(profile.device_name, profile.capability, profile.vram_total / GIB or None)
    card, c = match.card, calibration
    assumptions = {"card": match.assumption} if match.assumption else {}
    dense, triton = _dense_rate(card, how), how.around == "triton" or how.way.by_triton
    nominal = (card.int8_tops or 0) if how.way.products == "int8" else dense
    share: float = getattr(c, how.way.share_on(profile.capability))
    attention = how.attention_cost.share * (card.fp32_tflops if how.attention_cost.of == "float32" else dense)
    convolution = card.fp32_tflops if how.vae_dtype == "float32" else dense
    if card.name != "H200":
        known = f"{match.assumption}; " if match.assumption else ""
        assumptions["card"] = f"{known}{card.name} reaches the shares of its nominal rates measured on an H200"
    pinned = profile.pinned_gbps
    if pinned is None:
        pinned = card.pcie_gbps * c.pcie_share
        assumptions["copies"] = f"copies from pinned memory run at {pinned:.0f} GB/s, which was not measured"
    pageable = min(profile.pageable_gbps or c.pageable_gbps, pinned)
    disk = min(profile.disk_gbps or c.disk_gbps, pageable)
    if profile.disk_gbps is None:
        assumptions["disk"] = f"the disk reads {disk:.1f} GB/s, which was not measured"
    return Rates(
        linear=nominal * share * 1e12,
        attention=attention * 1e12,
        convolution=convolution * c.convolution_share[how.vae_dtype] * 1e12,
        vision=convolution * c.vision_share * 1e12,
        memory=card.memory_gbps * c.memory_share * 1e9,
        decode=min(card.fp32_tflops * 1e12 * c.decode_bytes_a_flop, card.memory_gbps * 1e9 / 2),
        copy={"pinned": pinned * 1e9, "pageable": pageable * 1e9, "disk": disk * 1e9},
        grouped=c.grouped_share,
        prepared_pixels=c.prepared_pixels,
        launch_seconds=c.launch_layer_seconds,
        token_layer_seconds=0.0 if triton else c.call_layer_seconds,
        graph_layer_seconds=0.0 if triton else c.step_layer_seconds if how.around == "cuda" else c.plain_layer_seconds,
        token_share=_token_share(card, how, c),
        assumptions=assumptions,
    )


def _token_share(card: Card, how: ComputeConfig, calibration: Calibration) -> dict[str, float]:
    if how.around == "cuda":
        memory, flops = card.memory_gbps * 1e9 * calibration.memory_share, card.fp32_tflops * 1e12
        return {form: min(1.0, flops * a / memory) for form, a in calibration.packed_bytes_a_flop.items()}
    if how.around != "triton" or how.dtype != "bfloat16":
        return {}
    dense = dict.fromkeys(("source", "bf16"), calibration.dense_token_share)
    return {"nf4": calibration.nf4_token_share, **calibration.gguf_token_share, **dense}


def _dense_rate(card: Card, how: ComputeConfig) -> float:
    """Nominal TFLOP/s of dense matmuls."""
    if how.dtype == "float32":
        return card.fp32_tflops
    if how.dtype == "bfloat16":  # emulated through float32 where the card has none
        return card.bf16_tflops or card.fp32_tflops / 2
    return card.fp16_tflops


def _cpu_rates(profile: HardwareProfile, how: ComputeConfig, calibration: Calibration) -> Rates:
    c, features = calibration, profile.cpu_features or (("avx2",) if profile.assumed else ())
    wide, wide_by = _best(c.cpu_gflops, features)
    dense, by = wide, wide_by
    if how.dtype == "bfloat16":
        dense, by = _best(c.cpu_bf16_gflops, features)
        if not by:  # emulated
            dense, by = wide / 2, wide_by
    linear, linear_by = dense, by
    if how.way.products == "int8":
        integer, integer_by = _best(c.cpu_int8_gops, features)
        if integer > dense:  # else a trial at loading finds dequantised weights faster
            linear, linear_by = integer, integer_by
    attention = dense * c.cpu_attention_share if how.dtype == "bfloat16" else wide
    per_second = profile.cores * 1e9
    weights = "int8" if how.way.products == "int8" else "float32" if how.dtype == "float32" else "bfloat16"
    memory = min(c.cpu_core_memory_gbps[weights] * profile.cores, c.cpu_memory_gbps) * 1e9
    what = f"{linear:g} billion operations a second ({linear_by or 'features unknown'})"
    return Rates(
        linear=linear * per_second,
        attention=attention * per_second,
        convolution=wide * per_second,
        vision=wide * per_second,
        memory=memory,
        decode=memory,
        copy={},
        grouped=1.0,
        prepared_pixels=c.prepared_pixels,
        layer_seconds=c.cpu_layer_seconds,
        assumptions={
            "processor": f"{profile.cores} cores of {what}, {memory / 1e9:g} GB/s of memory: not measured here"
        },
    )


def _best(table: Mapping[str, float], features: Sequence[str]) -> tuple[float, str]:
    """The highest rate among a processor's features, and that feature; the table's entry "" is for those without."""
    return max((rate, feature) for feature, rate in table.items() if feature in features or not feature)


def _elementwise_bytes(how: ComputeConfig, calibration: Calibration) -> float:
    """Memory traffic beside the matmuls, a token, layer and hidden value."""
    if how.device == "cpu":
        return calibration.elementwise_bytes * how.activation_itemsize / 2 * 1.2
    if how.around == "cuda":
        return calibration.elementwise_fp16_bytes if how.dtype == "float16" else calibration.elementwise_stepped_bytes
    if how.int32_products:
        return calibration.elementwise_int8_bytes
    if how.dtype == "float16":
        return calibration.elementwise_plain_fp16_bytes
    if how.around == "triton" or how.way.by_triton:
        return calibration.elementwise_bytes
    return calibration.elementwise_plain_bytes * how.itemsize / 2


@dataclass(frozen=True)
class Streaming:
    """What a pass over the layers copies."""

    source: Place = "device"
    slots: int = 0
    nbytes: Mapping[Expert, int] = field(default_factory=dict)
    """Streamed bytes of each expert."""
    crowded_layers: int = 0
    """Layers that stream both experts."""
    elsewhere: Mapping[Place, Mapping[Expert, int]] = field(default_factory=dict)
    """Those of them that wait in slower places than `source`."""

    def moved(self, experts: frozenset[Expert]) -> int:
        """Bytes copied by a pass that uses these experts."""
        return _of(self.nbytes, experts)

    def slowly(self, experts: frozenset[Expert]) -> dict[Place, int]:
        """Those that such a pass copies from the slower places."""
        return {place: _of(nbytes, experts) for place, nbytes in self.elsewhere.items()}


def _of(nbytes: Mapping[Expert, int], experts: frozenset[Expert]) -> int:
    return sum(count for expert, count in nbytes.items() if expert in experts)


class LatencyModel:
    """Predicted seconds of a model on a machine."""

    def __init__(self, facts: ModelFacts, how: ComputeConfig, machine: Rates, calibration: Calibration) -> None:
        self.facts, self.how, self.machine = facts, how, machine
        d = facts.config.decoder
        self._elementwise_bytes = _elementwise_bytes(how, calibration) * d.hidden_size * d.num_layers
        # INT8 is only converted, its scale meets the product; NF4 without a kernel takes many passes.
        quick = facts.format == "int8" or how.around != "torch" or how.device == "cpu"
        self._dequantise_bytes = 1 + how.itemsize if quick else calibration.dequantise_bytes
        self._unit_bytes = {
            expert: stored.nbytes(how.itemsize, how.decoded_at_load) for expert, stored in facts.by_expert.items()
        }
        self._coded: dict[tuple[int, int, Flops], float] = {}
        self._known: dict[tuple[int, int, int, frozenset[Expert]], float] = {}
        """Seconds of arithmetic of passes that were asked for: each placement that is weighed asks again."""
        self._read_bytes = self._unit_bytes if how.way.weights != "decoded at use" else self._decoded_bytes()
        self._beside = {expert: stored.beside for expert, stored in facts.by_expert.items()}
        self._adapter_bytes = calibration.adapter_bytes
        self._several_layer_seconds = calibration.several_layer_seconds
        by_graph = facts.whole or how.device == "cpu"
        self._token_layer_seconds = machine.token_layer_seconds if by_graph else calibration.call_layer_seconds
        self._compressed = {expert: stored.compressed for expert, stored in facts.by_expert.items()}

    def _decoded_bytes(self) -> dict[Expert, int]:
        """Of each expert as its products read it, where they read what was decoded and not what is stored."""
        by_expert, itemsize = self.facts.by_expert, self.how.itemsize
        return {expert: stored.nbytes(itemsize, decoded=True) for expert, stored in by_expert.items()}

    def forward(self, tokens: int, keys: int, branches: int, experts: frozenset[Expert]) -> float:
        """Seconds of arithmetic of one pass over all layers, its weights in place. tokens are a branch's."""
        m, d = self.machine, self.facts.config.decoder
        expert: Expert = "gen" if "gen" in experts else "und"
        beside = self._beside.get(expert, Beside())
        routed = d.routed_values(expert)
        multiplied = d.multiplied(expert) + beside.values + routed * (1 / m.grouped - 1)
        linears = 2 * multiplied * tokens * branches / m.linear
        attention = 4 * d.num_layers * d.hidden_size * tokens * keys * branches / m.attention
        moved = self._elementwise_bytes + self._adapter_bytes * beside.passed
        elementwise = moved * tokens * branches / m.memory
        # A picture's two markers go through weights of their own, which takes as long as reading them.
        markers = self._read_bytes.get("und", 0) / m.memory if "gen" in experts else 0.0
        reading = self._read_bytes.get(expert, 0) / m.memory
        calls = d.num_layers * len(experts & self.facts.experts) * m.layer_seconds
        return max(linears + attention + elementwise, reading) + markers + calls + self._decoding(experts, tokens)

    def _decoding(self, experts: frozenset[Expert], tokens: int) -> float:
        """Seconds that a pass spends on turning stored weights into dense ones, beyond reading them."""
        weights = sum(self._compressed.get(expert, 0) for expert in experts)
        if self.how.way.weights == "decoded at use":
            return weights * self.how.itemsize / self.machine.decode
        share = self.machine.token_share.get(self.facts.format)
        if tokens == 1 and share is not None:
            reading = sum(self._unit_bytes.get(expert, 0) for expert in experts) / self.machine.memory
            return reading * (1 / share - 1)
        if self.how.way.weights == "dequantized":
            return weights * self._dequantise_bytes / self.machine.memory
        return 0.0

    def passing(self, tokens: int, keys: int, branches: int, experts: frozenset[Expert], streaming: Streaming) -> float:
        """Seconds of one pass over all layers: the longer of arithmetic and copies, which overlap."""
        what = tokens, keys, branches, experts
        arithmetic = self._known[what] if what in self._known else self._known.setdefault(what, self.forward(*what))
        moved = streaming.moved(experts)
        if not moved:
            return arithmetic
        copy = moved / self.machine.copy[streaming.source]
        both = len(experts & self.facts.experts) > 1
        if both and streaming.crowded_layers and streaming.slots == 3:
            # While a layer computes in two slots, only one of the next layer's two units can be copied.
            layers = self.facts.config.decoder.num_layers
            arithmetic += copy * streaming.crowded_layers / (layers + streaming.crowded_layers)
        seconds = max(arithmetic, copy)
        return seconds + self._waits(streaming, experts, seconds)

    def _waits(self, streaming: Streaming, experts: frozenset[Expert], seconds: float) -> float:
        """Seconds by which units in slower places than the others prolong a pass that would take `seconds` without.

        They are read by one thread while the pass goes on, each from when it is one of the next few in the order of
        use: as many as there are slots beside those in use.
        """
        slowly = streaming.slowly(experts)
        reading = sum(count / self.machine.copy[place] for place, count in slowly.items())
        crowded = len(experts & self.facts.experts) > 1 and streaming.crowded_layers > 0
        ahead = streaming.slots - (2 if crowded else 1)
        share = sum(slowly.values()) / streaming.moved(experts)
        return max(0.0, reading - seconds * min(1.0, ahead * share))

    def request(
        self, workload: Workload, streaming: Streaming, staged: frozenset[str], batch: bool, graph_tokens: int = 0,
        launched: float | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Seconds of each phase of a request on one card; `graph_tokens` is as of a plan, and `launched` what an
        evaluation takes to be launched, where that is not as usual."""
        seconds = dict.fromkeys(("prefill", "text", "denoise", "decode"), 0.0)
        passes = [(workload.text_tokens, TEXT_EXPERTS)] if workload.text_tokens else []
        if workload.guided_branches > 2:
            passes.append((workload.alone_tokens, TEXT_EXPERTS))
        for (rows, columns), seen in zip(workload.input_grids, workload.seen_tokens, strict=True):
            if "vit" not in self.facts.left_out:
                pixels = rows * columns * self.facts.config.token_pixels**2
                seconds["prefill"] += pixels / self.machine.prepared_pixels
            passes.append((seen + MARKERS, TEXT_EXPERTS))
            seconds["prefill"] += self._looking(seen)
            if workload.encodes:
                passes.append((rows * columns + MARKERS, PICTURE_EXPERTS))
                seconds["prefill"] += self._coding(rows, columns, _encode_flops)
        if workload.apart_tokens:
            passes += passes[-2 * (workload.turns - 1) :]
        launching = self.facts.config.decoder.num_layers * self.machine.launch_seconds
        seconds["prefill"] += sum(
            max(launching, self.passing(tokens, workload.context_tokens, 1, experts, streaming))
            for tokens, experts in passes
        )
        if workload.new_tokens:
            seconds["text"] = workload.new_tokens * self._token(workload, streaming) + self._moving({"lm_head"}, staged)
        if workload.input_grids:
            seconds["prefill"] += self._moving({"vit"}, staged)
        if workload.picture_tokens:
            # Of what is drawn in turn the first sees none of the others, and the last all of them.
            seen = workload.context_tokens - workload.returned_tokens // 2
            single = self._evaluating(workload, seen, 1, streaming, graph_tokens, launched)
            guided = workload.branches * single
            if batch:
                guided = self._evaluating(workload, seen, workload.branches, streaming, graph_tokens, launched)
            each = workload.guided_steps * guided + (workload.steps - workload.guided_steps) * single
            each += self.capturing(workload, batch, graph_tokens)
            decoding = workload.frames * self._coding(*workload.grid, _decode_flops) + self._moving({"vae"}, staged)
            seconds["denoise"], seconds["decode"] = workload.drawings * each, workload.drawings * decoding
        return seconds

    def branch(self, workload: Workload, tokens: int, streaming: Streaming, graph_tokens: int = 0) -> float:
        """Seconds of one evaluation of a branch that sees so many tokens beside the picture."""
        return self._evaluating(workload, tokens, 1, streaming, graph_tokens)

    def capturing(self, workload: Workload, batch: bool, graph_tokens: int) -> float:
        """What a drawing's graphs take to be made, which the host launches once more for: one of each pass."""
        alone = workload.steps > workload.guided_steps
        passes = [1] * max(workload.branches, int(alone))
        if batch:
            passes = [*[workload.branches][: workload.guided_steps], *[1][: int(alone and workload.branches > 1)]]
        return self.launching * sum(count * workload.picture_tokens <= graph_tokens for count in passes)

    def launching_among(self, cards: int) -> float:
        """Seconds that the host takes to launch an evaluation where one thread launches on so many cards."""
        if cards == 1 or not self.machine.launch_seconds:
            return self.launching
        return len(PICTURE_EXPERTS) * self.facts.config.decoder.num_layers * self._several_layer_seconds

    def host_bound_tokens(self, most: int, cards: int) -> int:
        """Of passes of both experts of up to `most` tokens, how many the greatest has that the host may be the bound
        of, where it launches one on each of so many cards."""
        if not self.facts.whole:
            return 0
        bound, fewest = cards * self.launching_among(cards) * SLOWER_HOST, 0
        while fewest < most:
            middle = (fewest + most + 1) // 2
            if self.forward(middle, middle, 1, PICTURE_EXPERTS) <= bound:
                fewest = middle
            else:
                most = middle - 1
        return fewest

    @property
    def launching(self) -> float:
        """Seconds that the host takes to launch an evaluation, layers of both experts, however small the picture."""
        return len(PICTURE_EXPERTS) * self.facts.config.decoder.num_layers * self.machine.launch_seconds

    def _evaluating(
        self, workload: Workload, tokens: int, branches: int, streaming: Streaming, graph_tokens: int,
        launched: float | None = None,
    ) -> float:  # fmt: skip
        """Of so many branches in one batch."""
        picture = workload.picture_tokens
        least = self.launching if launched is None else launched
        if branches * picture <= graph_tokens:
            least = 0.0
        return max(least, self.passing(picture, tokens + picture, branches, PICTURE_EXPERTS, streaming))

    def _token(self, workload: Workload, streaming: Streaming) -> float:
        """Seconds of one token of text."""
        there = "lm_head" not in self.facts.left_out
        head = part_bytes(self.facts, self.how, "lm_head") / self.machine.memory if there else 0.0
        layers, machine = self.facts.config.decoder.num_layers, self.machine
        passing = self.passing(1, workload.context_tokens + workload.new_tokens, 1, TEXT_EXPERTS, streaming)
        if machine.graph_layer_seconds and not streaming.moved(TEXT_EXPERTS) and self.facts.whole:
            return passing + layers * machine.graph_layer_seconds + head
        return max(layers * self._token_layer_seconds, passing) + head

    def _moving(self, parts: set[str], staged: frozenset[str]) -> float:
        copy = self.machine.copy.get("pageable")
        count = sum(part_bytes(self.facts, self.how, part) for part in (parts & staged) - self.facts.left_out)
        return count / copy if copy else 0.0

    def _looking(self, tokens: int) -> float:
        if "vit" in self.facts.left_out:
            return 0.0
        v = self.facts.config.vit
        weights = v.num_layers * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
        return (2 * weights * tokens + 4 * v.num_layers * v.hidden_size * tokens**2) / self.machine.vision

    def _coding(self, rows: int, columns: int, flops: Flops) -> float:
        if "vae" in self.facts.left_out:
            return 0.0
        what, c = (rows, columns, flops), self.facts.config
        if what not in self._coded:
            self._coded[what] = flops(c.vae, rows * columns * c.latent_patch**2) / self.machine.convolution
        return self._coded[what]


class Flops:
    """Operations of one half of the autoencoder for a number of latent positions."""

    def __init__(self, extra_blocks: int, upwards: bool) -> None:
        self.extra_blocks, self.upwards = extra_blocks, upwards

    def __call__(self, c: VaeConfig, positions: int) -> float:
        total, widest = 0.0, c.ch * c.ch_mult[-1]
        middle = 2 * 2 * 9 * widest**2 * 2 * positions + 4 * widest * positions**2
        width = widest if self.upwards else c.ch
        levels = range(len(c.ch_mult))
        for level in reversed(levels) if self.upwards else levels:
            area, out = positions * 4 ** (len(c.ch_mult) - 1 - level), c.ch * c.ch_mult[level]
            for _ in range(c.num_res_blocks + self.extra_blocks):
                total += 2 * 9 * (width * out + out * out) * area
                width = out
            resampled = level if self.upwards else level < len(c.ch_mult) - 1
            if resampled:
                total += 2 * 9 * out * out * (4 * area if self.upwards else area / 4)
        return total + middle


_decode_flops = Flops(1, upwards=True)
_encode_flops = Flops(0, upwards=False)
