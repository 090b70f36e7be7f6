"""What a file is instead of what its name says, told by its first bytes, and what to do about it.

Programs that fetch models leave other things in a file's place: a Git LFS pointer, a web page, an error of the server.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..files import open_file

FIRST_BYTES = 4096

LFS_REMEDY = "run `git lfs pull` in its clone, or fetch it with `lowmem-bagel download`"
PAGE_REMEDY = "fetch the file itself: on Hugging Face its address has /resolve/ where the page's has /blob/"
PICKLE_REMEDY = "a pickle is never loaded (it can run code); use the safetensors files of the model"
EMPTY_REMEDY = "fetch it again; the disk may have been full"

_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|\?xml|error)\b", re.IGNORECASE | re.DOTALL)
_ANSWER = re.compile(
    rb"(entry not found|repository not found|not found|access denied|access to model|invalid username|unauthorized)",
    re.IGNORECASE,
)


def _starts(*marks: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(marks)


KNOWN: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (_starts(b"version https://git-lfs", b"version https://hawser"), "a Git LFS pointer, not the file", LFS_REMEDY),
    (lambda head: _PAGE.match(head) is not None, "a web page, not the file", PAGE_REMEDY),
    (lambda head: _ANSWER.match(head) is not None, "a server's refusal, not the file", PAGE_REMEDY),
    (_starts(b"GGUF"), "a GGUF file under another name", "rename it to end in .gguf"),
    (_starts(b"PK\x03\x04", b"PK\x05\x06"), "a zip archive or a file of torch.save", PICKLE_REMEDY),
    (lambda head: head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05", "a pickle", PICKLE_REMEDY),
    (
        _starts(b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"),
        "a compressed file", "unpack it first",
    ),
    (_starts(b"\x93NUMPY"), "a NumPy file", "use the model's safetensors files"),
    (_starts(b"\x89HDF\r\n"), "an HDF5 file", "use the model's safetensors files"),
    (lambda head: head[257:262] == b"ustar", "a tar archive", "unpack it first"),
    (lambda head: len(head) > 8 and not any(head), "zero bytes: a download that broke off", EMPTY_REMEDY),
)  # fmt: skip


def first_bytes(path: Path) -> bytes:
    """The beginning of an ordinary file; OSError passes through."""
    with open_file(path) as file:
        return file.read(FIRST_BYTES)


def what_instead(head: bytes) -> str | None:
    """What begins with these bytes, in words with the remedy: "a web page, not the file; fetch ..."; None where it may
    be what its name says."""
    if not head:
        return f"an empty file; {EMPTY_REMEDY}"
    text = head.removeprefix(b"\xef\xbb\xbf")
    return next((f"{what}; {remedy}" for begins, what, remedy in KNOWN if begins(text)), None)


def text_instead(head: bytes) -> str | None:
    """What a text is that stands where numbers should, such as a server's answer; None where these are no text."""
    try:
        text = head.decode("ascii").strip()
    except UnicodeDecodeError:
        return None
    if len(text) < 10 or not all(c.isprintable() or c.isspace() for c in text):
        return None
    return f"a text that begins {' '.join(text.split())[:60]!r}, perhaps a server's answer; {PAGE_REMEDY}"


def said_instead(path: Path) -> str | None:
    """`what_instead` of a file; None where it cannot be read either."""
    try:
        return what_instead(first_bytes(path))
    except OSError:
        return None
