"""`lowmem-bagel bench serving`: what the server costs beside its pipeline, and what it gives to many clients.

A picture by the pipeline and through the API, in turns; pictures a minute for several numbers of clients, each of whom
asks for the next when it has one; and the process's memory over many short answers.
"""

from __future__ import annotations

import base64
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Out, Shape, Size, Timesteps
from ..rows import Row

if TYPE_CHECKING:
    from lowmem_bagel.serve.service import Service

PROMPT = "a photo of a red fox in the snow"
QUESTION = "what is a fox?"
CLIENTS_OF_ANSWERS = 8
WARM_ANSWERS = 50
"""After which memory is looked at first."""
TIMEOUT = 600.0


def serving_command(
    rows: Annotated[list[str], typer.Argument(help="format[:limit GB] of random weights; a folder for a format.")],
    shape: Shape = "bagel-7b",
    size: Size = 1024,
    num_timesteps: Timesteps = 50,
    clients: Annotated[str, typer.Option(help="Numbers of clients, for pictures a minute.")] = "1,2,4,8",
    pictures: Annotated[int, typer.Option(help="Pictures for each number of clients, and one for each of them.")] = 4,
    repeat: Annotated[int, typer.Option(help="Pictures by the pipeline, and as many through the API.")] = 3,
    answers: Annotated[int, typer.Option(help="Short answers, over which memory is to stay flat.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    out: Out = Path("serving.json"),
) -> None:
    """Measure rows one after the other and write a JSON record after each."""
    from ..record import write_record

    numbers = [int(number) for number in clients.split(",")]
    settings = {
        "shape": shape, "size": size, "num_timesteps": num_timesteps, "pictures": pictures, "repeat": repeat,
        "answers": answers,
    }  # fmt: skip
    picture = {"prompt": PROMPT, "size": f"{size}x{size}", "num_timesteps": num_timesteps, "seed": 0}
    results: list[dict[str, Any]] = []
    for text in rows:
        with serving(Row.parse(text), shape, device) as (service, url):
            ask = _asker(url, picture)
            found: dict[str, Any] = {"row": text, **_beside_the_pipeline(service, ask, size, num_timesteps, repeat)}
            found["clients"] = {number: _together(ask, number, max(pictures, number)) for number in numbers}
            found |= _memory(url, answers)
        results.append(found)
        write_record(out, "serving", settings, results)
        print(f"{text:20s}", _line(found), flush=True)


@contextmanager
def serving(row: Row, shape: str, device: str) -> Iterator[tuple[Service, str]]:
    """A server in this process on a port that was free, its model loaded."""
    import torch

    from lowmem_bagel.checkpoint.folder import ModelFolder
    from lowmem_bagel.serve.app import create_app
    from lowmem_bagel.serve.options import ServeOptions
    from lowmem_bagel.serve.server import serve
    from lowmem_bagel.serve.service import Service
    from lowmem_bagel.settings import LoadOptions

    from ..synthetic import synthetic_folder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_folder = Path(row.format).is_dir()
    folder = ModelFolder.open(row.format) if is_folder else synthetic_folder(row.format, shape, device)

    class Opened(Service):
        def open_folder(self) -> ModelFolder:
            return folder

    loading = LoadOptions(device=device, max_vram=int(row.limit_gb * 1e9) or None, backend=row.backend, dtype=row.dtype)
    service = Opened(folder.path, loading, ServeOptions(port=0, page=False, queue=64))
    found: list[str] = []
    over = threading.Event()
    service.when_loaded = over.set

    def run() -> None:
        try:
            serve(service, create_app, lambda url, _: found.append(url))
        finally:
            over.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        over.wait()
        if service.failure is not None:
            raise service.failure
        yield service, found[0]
    finally:
        service.when_failed()  # as if it could not go on: the server leaves
        thread.join()


def _asker(url: str, picture: dict[str, Any]) -> Callable[[], float]:
    """What asks for the picture and gives the seconds until it is whole."""

    def ask() -> float:
        start = time.perf_counter()
        answer = _post(f"{url}/v1/images/generations", picture)
        assert base64.b64decode(answer["data"][0]["b64_json"])
        return time.perf_counter() - start

    return ask


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)


def _beside_the_pipeline(
    service: Service, ask: Callable[[], float], size: int, num_timesteps: int, repeat: int
) -> dict[str, Any]:
    """Seconds of the same picture by both ways, after one of each."""
    assert service.loaded is not None
    pipeline = service.loaded.pipeline

    def draw() -> float:
        start = time.perf_counter()
        pipeline.generate(PROMPT, height=size, width=size, num_timesteps=num_timesteps, seed=0)
        return time.perf_counter() - start

    draw(), ask()
    pairs = [(draw(), ask()) for _ in range(repeat)]
    direct, served = ([pair[way] for pair in pairs] for way in (0, 1))
    share = statistics.median(served) / statistics.median(direct) - 1
    return {"pipeline_seconds": direct, "api_seconds": served, "api_share": share}


def _together(ask: Callable[[], float], clients: int, pictures: int) -> dict[str, Any]:
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        seconds = list(pool.map(lambda _: ask(), range(pictures)))
        elapsed = time.perf_counter() - start
    return {"pictures_a_minute": 60 * pictures / elapsed, "seconds": seconds}


def _memory(url: str, answers: int) -> dict[str, Any]:
    """The process's memory after some answers, and after many more."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}

    def ask(count: int) -> int:
        with ThreadPoolExecutor(CLIENTS_OF_ANSWERS) as pool:
            list(pool.map(lambda _: _post(f"{url}/v1/chat/completions", body), range(count)))
        return _resident()

    before = ask(min(WARM_ANSWERS, answers))
    return {"rss_bytes": {"before": before, "after": ask(answers)}}


def _resident() -> int:
    """Bytes of RAM that this process holds."""
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _line(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{number}: {of['pictures_a_minute']:.2f}" for number, of in found["clients"].items())
    memory = found["rss_bytes"]
    seconds = statistics.median(found["pipeline_seconds"])
    return (
        f"{seconds:.2f} s by the pipeline, {found['api_share']:+.1%} through the API; "
        f"pictures a minute by clients: {rates}; memory {(memory['after'] - memory['before']) / 1e6:+.1f} MB"
    )
