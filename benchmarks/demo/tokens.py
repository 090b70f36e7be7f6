"""The demo checkpoint's tokenizer: a byte-level BPE of 507 tokens trained on its sentences, plus five special tokens.

It has Qwen2's normaliser and splitting rule, so the code that reads the published tokenizer reads this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from .scenes import CANVASES, random_edit, random_scene
from .sentences import caption, instruction, question

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
VOCAB_SIZE = 512
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sample_sentences(scenes: int, seed: int = 0) -> list[str]:
    """Captions, instructions, questions and answers of as many random scenes."""
    rng = Random(seed)
    lines: list[str] = []
    for index in range(scenes):
        scene = random_scene(rng, CANVASES[index % len(CANVASES)])
        asked = [question(rng, scene) for _ in range(2)]
        lines += [caption(rng, scene).text, instruction(rng, random_edit(rng, scene))]
        lines += [q.text for q in asked] + [q.answer for q in asked]
    return lines


def build_tokenizer(lines: list[str]) -> Any:
    """A `tokenizers.Tokenizer` with VOCAB_SIZE tokens, the special ones last."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of the special tokens by name."""
    return {token: tokenizer.token_to_id(token) for token in SPECIAL}


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json, vocab.json, merges.txt and tokenizer_config.json, as a Qwen2 checkpoint has them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **plain} for t in SPECIAL},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
