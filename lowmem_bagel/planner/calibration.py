"""The measured constants behind the planner's predictions, each with where it comes from. Pure; no torch.

"H200" is one H200 on PCIe 5 with torch 2.11 and CUDA 13, 7B shape, random weights. What was not measured says
"assumed"; plans made for other cards repeat the assumptions that matter to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..hardware.profile import CONTEXT_BYTES


@dataclass(frozen=True)
class Calibration:
    """Bytes, shares of a nominal rate, and rates. A share measured on the H200 is taken to hold for other cards.

    What attention reaches stands with its backends, in `ops.attention`.
    """

    context_bytes: int = CONTEXT_BYTES
    workspace_bytes: int = 120_000_000
    """cuBLAS workspaces (32 MiB a stream on Hopper), attention and DFloat11 tables. Assumed."""
    convolution_bytes: int = 200_000_000
    """cuDNN's workspace for the VAE's largest convolutions. Assumed."""
    slack: float = 0.2
    """Share by which the allocator holds more than activations need, rounding and fragments. Chosen so that the
    limited rows of engine_h200.json stayed below their predicted peaks."""
    reserve_bytes: int = 500_000_000
    """Kept free below a limit, for prompts longer than planned and for what is predicted wrong."""
    reserve_share: float = 1 / 15
    """The reserve is at most this share of the limit, so that small cards keep most of theirs."""
    host_bytes: int = 2_500_000_000
    """Host memory of a process with torch and CUDA loaded, weights aside. Assumed."""
    cpu_process_bytes: int = 600_000_000
    """Memory of a process on the CPU, weights aside: 0.23 GB with torch 2.13, and room for what its libraries keep."""
    usable_ram: float = 0.9
    """Share of the available RAM that a plan may take."""
    staging_bytes: int = 4 * (32 << 20)
    """Page-locked staging buffers where weights are not page-locked themselves."""

    linear_share: float = 690 / 989
    """bf16 matmul of the layer's shapes, H200: 690 of 989 TFLOP/s."""
    int8_triton_share: float = 1040 / 1979
    """Triton int8 matmul with fused scales, H200: 1040 of 1979 TOP/s, by what pictures and edits take
    (engine_h200.json, report_h200.json)."""
    int8_pairs_share: float = 1300 / 1979
    """The same by pairs of blocks, on Hopper: a picture takes 5.63 s and an edit 11.93 (int8_pairs_h200.json)."""
    int8_library_share: float = 665 / 1979
    """torch._int_mm, H200: 665 of 1979 TOP/s."""
    grouped_share: float = 0.68
    """Products of routed experts with all around them, of the rate of whole ones: with it pictures of BAGEL-MoE take
    5.8 s in INT8 and 7.7 in bf16 where 5.8 and 7.8 were measured (engine_moe_h200.json). The MLP alone: 0.63
    (routed_h200.json)."""
    vision_share: float = 0.3
    """The vision tower, of the matmul rate of its dtype: 24 ms for a picture of 1024x1024 (contexts_h200.json
    of commit 3275205)."""
    convolution_share: Mapping[str, float] = field(default_factory=lambda: {"bfloat16": 0.1, "float32": 0.35})
    """The autoencoder, of the matmul rate of its dtype: a picture of 1024x1024 is decoded in 0.11 s in bf16, in 0.44 in
    float32 (report_h200.json)."""
    memory_share: float = 2840 / 4800
    """Reading weights for one token, H200: 2840 of 4800 GB/s."""
    dense_token_share: float = 1.2
    """Of that, what Triton's kernels read dense bf16 weights with for one token: 4.2 ms a token, of which lm_head 0.4
    (report_h200.json)."""
    nf4_token_share: float = 0.55
    """Of that, what Triton's NF4 kernel reads weights with for one token: unpacking the codes takes the rest. 363
    tokens/s, of which lm_head in bf16 takes 0.4 ms each (engine_h200.json)."""
    gguf_token_share: Mapping[str, float] = field(
        default_factory=lambda: {"gguf-q8_0": 0.6, "gguf-q6_k": 0.32, "gguf-q5_k": 0.26, "gguf-q4_k": 0.24}
    )
    """The same with the blocks of GGUF's types: 225, 159, 156 and 171 tokens/s (report_gguf_h200.json)."""
    elementwise_bytes: float = 55.0
    """Memory traffic beside the matmuls, a token, layer and hidden value in bf16, at the rate that weights are read
    with: H200, 90 forwards of 4098 tokens took 8.97 s (engine_h200.json of commit bbcbae7) where their matmuls and
    attention take 89 ms each and the markers' weights 2.5. SwiGLU in its matmul's epilogue, on Hopper, has taken 0.3 s
    off since."""
    elementwise_plain_bytes: float = 285.0
    """The same by PyTorch's operations: 11.7 s (engine_h200_without_triton_plain.json)."""
    elementwise_stepped_bytes: float = 80.0
    """The same by the CUDA kernels that need no Triton: 9.1 s in bf16 and 9.8 in INT8
    (engine_h200_without_triton.json)."""
    elementwise_fp16_bytes: float = 130.0
    """The same in fp16 arithmetic, whose residual stream is float32: 13.6 s with dense weights, 13.1 in INT8
    (engine_h200_as_turing.json)."""
    elementwise_plain_fp16_bytes: float = 610.0
    """The same by PyTorch's operations: 19.1 s, of which matmuls and attention take 10.6 by the shares above
    (engine_h200_as_turing_plain.json)."""
    elementwise_int8_bytes: float = 1170.0
    """The same around `torch._int_mm`, by PyTorch's operations: 26.8 s, of which products and attention take 10.8
    (engine_h200_as_turing_plain.json)."""
    adapter_bytes: float = 4.4
    """Memory traffic of adapters kept beside encoded weights, a token and value that goes into such a linear or comes
    out of it: 1.3 s of a picture in INT8 and in DFloat11 (engine_adapters_h200.json beside engine_h200.json)."""
    dequantise_bytes: float = 31.0
    """Memory traffic of dequantising an NF4 weight by PyTorch's operations: 7.1 s more than dense weights in 49 passes
    (engine_h200_as_turing_plain.json). A kernel of ours is taken to read a byte a value, and to write the result."""
    call_layer_seconds: float = 1.44e-3
    """PyTorch's calls for a layer of one token, where no graph replays them: an answer of 256 tokens took 10.3 s with
    INT8 in fp16 arithmetic (engine_h200_as_turing.json of commit 3765db4), on that machine's processor."""
    launch_layer_seconds: float = 0.53e-3
    """A layer's launches by Triton's kernels, which a pass over few tokens takes no less than: a question of some 20
    tokens after a picture took 14.8 ms (contexts_h200.json of commit 3275205)."""
    several_layer_seconds: float = 0.95e-3
    """The same where one thread launches on several cards, by turns: guided steps of a picture on two took 0.115 s in
    INT8 and 0.105 in bf16, of which a card computes 0.06 and 0.1 (engine_devices_h200.json of commit 4eafe37)."""
    prepared_pixels: float = 97e6
    """Pixels of an input picture that the host makes ready for the encoders a second: 10.8 ms for one of 1024x1024
    (contexts_h200.json)."""
    step_layer_seconds: float = 0.04e-3
    """The kernels of a layer of one token that a graph replays, beside reading the weights, without Triton: an answer
    in fp16 arithmetic takes 5.9 ms a token (engine_h200_as_turing.json), of which reading 5.0."""
    plain_layer_seconds: float = 0.36e-3
    """The same by PyTorch's operations: 12.9 ms a token with INT8, of which reading 2.7
    (engine_h200_as_turing_plain.json)."""
    packed_bytes_a_flop: Mapping[str, float] = field(
        default_factory=lambda: {"int8": 1440 / 66_900, "nf4": 520 / 66_900}
    )
    """Bytes of packed weights that the kernels without Triton multiply with one token, a float32 operation of the
    card's nominal rate: 6.0 and 8.5 ms a token, of which lm_head and the other kernels take 1.5
    (engine_h200_as_turing.json)."""
    decode_bytes_a_flop: float = 1330 / 66_900
    """DFloat11: bytes written a float32 operation of the card's nominal rate. H200: 49 passes that decode 26 GB each
    took 0.96 s longer than without (engine_h200.json)."""
    pcie_share: float = 0.88
    """Copies from pinned memory, of the nominal rate: H200, 55.4 of 63 GB/s."""
    pageable_gbps: float = 6.1
    """Copies from pageable memory, H200 machine."""
    exchange_seconds: float = 0.3e-3
    """What two cards lose to each other a guided step beside the bytes: events, and threads that hand work on.
    Assumed."""
    disk_gbps: float = 2.0
    """Reading a disk whose speed was not measured. Assumed: an NVMe drive of the middle class."""

    cpu_gflops: Mapping[str, float] = field(default_factory=lambda: {"avx512f": 170.0, "avx2": 50.0, "": 15.0})
    """float32 GFLOP/s a core, for linears, attention and convolutions alike. avx512f: 1024x3584x3584 on one and on two
    cores of a Xeon (Sapphire Rapids' features), torch 2.13; others assumed."""
    cpu_bf16_gflops: Mapping[str, float] = field(
        default_factory=lambda: {"amx_bf16": 1000.0, "avx512_bf16": 300.0, "": 0.0}
    )
    """The same in bfloat16, where it is native. amx_bf16 measured, avx512_bf16 assumed."""
    cpu_int8_gops: Mapping[str, float] = field(
        default_factory=lambda: {"amx_int8": 600.0, "avx512_vnni": 300.0, "avx_vnni": 100.0, "": 0.0}
    )
    """The same in INT8 with activations quantised on the way. amx_int8 measured, others assumed."""
    cpu_attention_share: float = 0.5
    """bfloat16 attention, of the linears' rate: 7 heads of 128, 2048 tokens, same Xeon."""
    cpu_core_memory_gbps: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 15.0, "bfloat16": 11.5, "int8": 6.0}
    )
    """Reading weights for one token, a core, same Xeon: 3584x18944. float16 is assumed like bfloat16."""
    cpu_memory_gbps: float = 40.0
    """All cores together at most. Assumed: two channels of a desktop."""
    cpu_layer_seconds: float = 0.45e-3
    """PyTorch's calls for one expert's layer: the demo checkpoint's seconds for a token of text, same Xeon."""


MEASURED = Calibration()
"""The constants in use."""
