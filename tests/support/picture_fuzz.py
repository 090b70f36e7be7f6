"""Opens damaged pictures one after the other, in a process of its own, and prints what went wrong as JSON lines.

python tests/support/picture_fuzz.py COUNT SEED
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lowmem_bagel.errors import UserError
from lowmem_bagel.pictures.opening import open_picture
from support.fuzz import watched
from support.picture_files import inputs

SECONDS, BYTES = 5.0, 1_000_000_000
NOWHERE = Path("/nowhere")
"""The pictures are bytes: no file is to be opened for them."""


def main(count: int, seed: int) -> None:
    opened, most, longest = 0, 0, (0.0, "")
    for index, (name, data) in enumerate(inputs(count, seed)):
        begin, failed = time.perf_counter(), ""
        try:
            with watched(NOWHERE) as seen:
                picture = open_picture(data)
            opened += 1
            assert picture.image.mode == "RGB"
        except UserError as error:
            if not str(error).isprintable() or len(str(error)) > 1000:
                failed = f"message {error!s:.200}"
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        seconds, peak = time.perf_counter() - begin, peak_bytes()
        if seconds > SECONDS:
            failed = f"{seconds:.1f} s"
        if peak > max(most, BYTES):
            failed = f"{peak} bytes"
        most, longest = max(most, peak), max(longest, (seconds, f"{name} {index}"))
        if seen:
            failed = seen[0]
        if failed:
            print(json.dumps({"index": index, "name": name, "failed": failed}), flush=True)
    print(json.dumps({"tried": count, "opened": opened, "peak_bytes": most, "longest": longest}))


def peak_bytes() -> int:
    """The most memory that this process held. What `getrusage` says is the parent's until more is taken."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
