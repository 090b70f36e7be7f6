"""The published DFloat11 checkpoint's grouping: a group a layer, and the two embeddings."""

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
GEN = [name + "_moe_gen" if "attn" in name else name.replace("mlp", "mlp_moe_gen") for name in LINEARS]
PUBLISHED = {
    r"language_model\.model\.embed_tokens": [],
    r"language_model\.model\.layers\.\d+": LINEARS + GEN,
    r"language_model\.lm_head": [],
}
