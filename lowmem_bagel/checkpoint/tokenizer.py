"""Qwen2's byte-level BPE tokenizer, as a checkpoint folder carries it."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .first_bytes import said_instead
from .small_files import SmallFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenisation, for folders that carry vocab.json and merges.txt but no tokenizer.json."""

MAX_BYTES = 64 << 20
"""Of a file with a vocabulary: several times the largest that is known."""


class BagelTokenizer:
    """Text to ids and back. `im_start` and `im_end` frame a text block, `vision_start` and `vision_end` a picture."""

    def __init__(self, files: Path | SmallFiles, ids: Mapping[str, int] | None = None) -> None:
        """Read `tokenizer.json`, or else `vocab.json`, `merges.txt` and `tokenizer_config.json`.

        Args:
            files: the folder that they are in, or where they are.
            ids: of special tokens, as the weights were made with them.

        Raises:
            CheckpointError: the files are missing or damaged, lack a special token or give it another id.
        """
        from tokenizers import Tokenizer

        small = SmallFiles(files) if isinstance(files, Path) else files
        folder, path = small.folder, small.where("tokenizer.json")
        whole = small.has("tokenizer.json")
        try:
            if whole:
                data = small.data("tokenizer.json", MAX_BYTES).removeprefix(codecs.BOM_UTF8)
            self._tokenizer = Tokenizer.from_buffer(data) if whole else _from_vocab(small)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception for every damaged file
            read = path if whole else folder / "vocab.json"
            instead = said_instead(read) or (None if whole else said_instead(folder / "merges.txt"))
            raise CheckpointError(f"{read}: damaged ({instead or error})") from error
        for token, id in (ids or {}).items():
            if self._tokenizer.token_to_id(token) != id:
                raise CheckpointError(
                    f"{folder}: {token} is token {self._tokenizer.token_to_id(token)}, and the weights were made with "
                    f"{id}; take the tokenizer that belongs to them"
                )
        self.im_start, self.im_end, self.vision_start, self.vision_end = (self._special(t, folder) for t in SPECIALS)

    def _special(self, token: str, folder: Path) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"{folder}: the tokenizer has no {token}; is it BAGEL's?")
        return found

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without the frame; special tokens written in the text become their ids."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def text_block(self, text: str) -> list[int]:
        """im_start, ids, im_end."""
        return [self.im_start, *self.encode(text), self.im_end]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens written out; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_generated(self, ids: Sequence[int]) -> str:
        """Text of generated ids, which begin with im_start: what stands before the first frame token after it."""
        text = self.decode(ids).removeprefix(SPECIALS[0])
        return text.split(SPECIALS[1])[0].split(SPECIALS[0])[0]


def has_tokenizer(files: SmallFiles) -> bool:
    """Whether a tokenizer is there."""
    return files.has("tokenizer.json") or files.has("vocab.json")


def _from_vocab(files: SmallFiles) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    folder, vocab = files.folder, files.json("vocab.json")
    try:
        lines = files.data("merges.txt", MAX_BYTES).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: tokenizer.json and merges.txt are missing; fetch one of them, or take the tokenizer of the "
            "checkpoint that it was made from with --base FOLDER"
        ) from None
    pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = files.json("tokenizer_config.json").get("added_tokens_decoder", {})
    specials = sorted(((int(id), token) for id, token in added.items()), key=lambda item: item[0])
    tokenizer.add_tokens(
        [AddedToken(token["content"], special=bool(token.get("special")), normalized=False) for _, token in specials]
    )
    for id, token in specials:
        found = tokenizer.token_to_id(token["content"])
        if found != id:
            raise CheckpointError(
                f"{folder}: {token['content']} becomes token {found}, and tokenizer_config.json says {id}; "
                "vocab.json belongs to another tokenizer"
            )
    return tokenizer
