"""`lowmem-bagel bench serving-page`: from the command to a server that listens, its page and its model, on the demo
checkpoint; the process's memory over many answers; and how far previews are from the pictures that they show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Out

PROMPTS = ("a red circle on a white background", "a blue square", "two green triangles", "a yellow circle")
CLIENTS = 8
WAIT = 0.02
"""Seconds between two looks."""


def serving_page_command(
    repeat: Annotated[int, typer.Option(help="Starts that are measured.")] = 3,
    answers: Annotated[int, typer.Option(help="Short answers, over which memory is to stay flat.")] = 1000,
    out: Out = Path("serving_page.json"),
) -> None:
    """Measure on this machine's processor and write a JSON record."""
    from ..record import write_record

    starts = []
    for _ in range(repeat):
        with started() as (_, _, seconds):
            starts.append(seconds)
    with started() as (process, url, _):
        rss = _memory(process, url, answers)
    results = {"starts": starts, "rss_bytes": rss, "previews": previews()}
    write_record(out, "serving-page", {"repeat": repeat, "answers": answers, "prompts": PROMPTS}, results)
    print(json.dumps(results, indent=1), flush=True)


@contextmanager
def started() -> Iterator[tuple[subprocess.Popen[str], str, dict[str, float]]]:
    """A server on a free port, ready; its address; and seconds from the command until it listened, until its page was
    there and until it was ready."""
    command = [
        sys.executable,
        "-c",
        "from lowmem_bagel.cli import main; main()",
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            seconds = {"listening": time.monotonic() - begun}
            threading.Thread(target=process.stdout.read, daemon=True).start()
            for name, path in (("page", "/"), ("ready", "/health")):
                while _status(url + path) != 200:
                    time.sleep(WAIT)
                seconds[name] = time.monotonic() - begun
            yield process, url, seconds
        finally:
            process.terminate()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _memory(process: subprocess.Popen[str], url: str, answers: int) -> list[tuple[int, int]]:
    """Answers given, and bytes of RAM that the process held then: ten times."""
    body = json.dumps({"messages": [{"role": "user", "content": "what is a circle?"}], "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})

    def ask(_: int) -> None:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()

    found, part = [], max(1, answers // 10)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(part, answers + 1, part):
            list(pool.map(ask, range(part)))
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            found.append((number, pages * os.sysconf("SC_PAGE_SIZE")))
    return found


def previews(num_timesteps: int = 25) -> dict[str, float]:
    """Of the demo checkpoint: seconds of the fit and of a preview, and the root of the mean square of what the last
    preview of a picture differs by from the picture, made as small, in steps of 255."""
    import numpy as np

    from lowmem_bagel import BagelPipeline
    from lowmem_bagel.demo_checkpoint import FOLDER

    pipe = BagelPipeline.from_pretrained(FOLDER, device="cpu", tasks=("generate",))
    begun = time.perf_counter()
    _ = pipe.model.colors
    fit = time.perf_counter() - begun
    squares, took = [], []
    for seed, prompt in enumerate(PROMPTS):
        shown: list[Any] = []

        def look(step: Any, shown: list[Any] = shown) -> None:
            begun = time.perf_counter()
            shown.append(step.preview().image())
            took.append(time.perf_counter() - begun)

        picture = pipe.generate(prompt, seed=seed, num_timesteps=num_timesteps, callback=look).image
        assert picture is not None
        small = np.asarray(picture.resize(shown[-1].size, 4), dtype=float)  # 4: each is the mean of its own pixels
        squares.append(((np.asarray(shown[-1], dtype=float) - small) ** 2).mean())
    pipe.close()
    return {
        "fit_seconds": fit, "seconds": float(np.median(took)), "error": float(np.sqrt(np.mean(squares))),
    }  # fmt: skip
