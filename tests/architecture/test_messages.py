"""What messages may advise."""

from __future__ import annotations

import re
from pathlib import Path

import lowmem_bagel

PACKAGE = Path(lowmem_bagel.__file__).parent
ALLOWED = {"checkpoint/safetensors_file.py", "checkpoint/gguf_file.py", "cli/convert.py"}
"""Where a length was found wrong, and a checksum. Elsewhere another download would bring the same file."""


def test_another_download_is_advised_where_a_length_or_a_checksum_is_wrong_alone() -> None:
    said = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"download (it|the \w+) again", path.read_text(encoding="utf-8"))
    }
    assert {name for name in said if not name.startswith("hub/")} == ALLOWED
