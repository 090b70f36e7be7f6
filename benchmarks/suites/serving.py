"""`lowmem-bagel bench serving`: what the server costs beside its pipeline, and what it gives to many clients.

A picture by the pipeline and through the API, in turns, and what the API's seconds are made of; pictures a minute for
several numbers of clients, each of whom asks for the next when it has one; and the process's memory over many short
answers. The record is written after every piece, so that a run which is cut off leaves what it has.
"""

from __future__ import annotations

import base64
import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Out, Shape, Size, Timesteps
from ..rows import Row

if TYPE_CHECKING:
    from lowmem_bagel.serve.jobs import Job
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
    """Measure rows one after the other and write a JSON record after each piece of one."""
    from ..record import write_record

    numbers = [int(number) for number in clients.split(",")]
    settings = {
        "shape": shape, "size": size, "num_timesteps": num_timesteps, "pictures": pictures, "repeat": repeat,
        "answers": answers,
    }  # fmt: skip
    picture = {"prompt": PROMPT, "size": f"{size}x{size}", "num_timesteps": num_timesteps, "seed": 0}
    results: list[dict[str, Any]] = []
    for text in rows:
        found: dict[str, Any] = {"row": text}
        results.append(found)
        with serving(Row.parse(text), shape, device) as (service, url):
            ask = Asker(service, url, picture)
            for piece in (
                _beside_the_pipeline(service, ask, size, num_timesteps, repeat),
                _clients(ask, numbers, pictures),
                _memory(url, answers),
            ):
                for figures in piece:
                    found |= figures
                    write_record(out, "serving", settings, results)
                    print(f"{text}: {', '.join(figures)}", file=sys.stderr, flush=True)
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

    loading = LoadOptions(
        device=device, max_vram=int(row.limit_gb * 1e9) or None, backend=row.backend, dtype=row.dtype,
        attention=row.attention, tune=bool(row.tune),
    )  # fmt: skip
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


class Asker:
    """Asks for a picture, again and again."""

    def __init__(self, service: Service, url: str, picture: dict[str, Any]) -> None:
        self.service, self.url, self.picture = service, f"{url}/v1/images/generations", picture

    def __call__(self) -> float:
        """Seconds until the picture is whole."""
        begun, *_, whole = self._times()
        return whole - begun

    def pieces(self) -> dict[str, float]:
        """Those, and what they are made of, where nobody else asks: until the request waits in the queue, its turn, the
        drawing, the answer written down, the answer sent, and read by the client."""
        jobs: SimpleQueue[Job] = SimpleQueue()
        self.service.ended.append(jobs.put)
        try:
            begun, answered, came, whole = self._times()
            job = jobs.get(timeout=TIMEOUT)
        finally:
            self.service.ended.remove(jobs.put)
        assert job.started is not None and job.ended is not None
        return {
            "seconds": whole - begun,
            "asking": job.created - begun,
            "queue": job.started - job.created,
            "drawing": job.ended - job.started,
            "encoding": answered - job.ended,
            "transfer": came - answered,
            "reading": whole - came,
        }

    def _times(self) -> tuple[float, float, float, float]:
        """When it was asked for, when the answer began, when it had come, and when the picture was read from it."""
        begun = time.monotonic()
        with _opened(self.url, self.picture) as answer:
            answered = time.monotonic()
            body = answer.read()
        came = time.monotonic()
        assert base64.b64decode(json.loads(body)["data"][0]["b64_json"])
        return begun, answered, came, time.monotonic()


def _opened(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _beside_the_pipeline(
    service: Service, ask: Asker, size: int, num_timesteps: int, repeat: int
) -> Iterator[dict[str, Any]]:
    """Seconds of the same picture by both ways, after one of each; after every pair."""
    assert service.loaded is not None
    pipeline = service.loaded.pipeline

    def draw() -> float:
        start = time.perf_counter()
        pipeline.generate(PROMPT, height=size, width=size, num_timesteps=num_timesteps, seed=0)
        return time.perf_counter() - start

    draw(), ask()
    direct: list[float] = []
    served: list[dict[str, float]] = []
    for _ in range(repeat):
        direct.append(draw())
        served.append(ask.pieces())
        took = {name: [each[name] for each in served] for name in served[0]}
        seconds = took.pop("seconds")
        share = statistics.median(seconds) / statistics.median(direct) - 1
        yield {
            "pipeline_seconds": list(direct), "api_seconds": seconds, "api_share": share,
            "api_pieces": {name: statistics.median(each) for name, each in took.items()},
        }  # fmt: skip


def _clients(ask: Callable[[], float], numbers: Sequence[int], pictures: int) -> Iterator[dict[str, Any]]:
    """Pictures a minute, after every number of clients."""
    found: dict[int, Any] = {}
    for number in numbers:
        found[number] = _together(ask, number, max(pictures, number))
        yield {"clients": dict(found)}


def _together(ask: Callable[[], float], clients: int, pictures: int) -> dict[str, Any]:
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        seconds = list(pool.map(lambda _: ask(), range(pictures)))
        elapsed = time.perf_counter() - start
    return {"pictures_a_minute": 60 * pictures / elapsed, "seconds": seconds}


def _memory(url: str, answers: int) -> Iterator[dict[str, Any]]:
    """The process's memory after some answers, and after many more."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}

    def answered(_: int) -> None:
        with _opened(f"{url}/v1/chat/completions", body) as answer:
            json.load(answer)

    def ask(count: int) -> int:
        with ThreadPoolExecutor(CLIENTS_OF_ANSWERS) as pool:
            list(pool.map(answered, range(count)))
        return _resident()

    before = ask(min(WARM_ANSWERS, answers))
    yield {"rss_bytes": {"before": before}}
    begun = time.perf_counter()
    after = ask(answers)
    yield {"rss_bytes": {"before": before, "after": after}, "answers_a_second": answers / (time.perf_counter() - begun)}


def _resident() -> int:
    """Bytes of RAM that this process holds."""
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _line(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{number}: {of['pictures_a_minute']:.2f}" for number, of in found["clients"].items())
    memory = found["rss_bytes"]
    seconds = statistics.median(found["pipeline_seconds"])
    return (
        f"{seconds:.2f} s by the pipeline, {found['api_share']:+.1%} through the API ({_shown(found['api_pieces'])}); "
        f"pictures a minute by clients: {rates}; memory {(memory['after'] - memory['before']) / 1e6:+.1f} MB"
    )


def _shown(pieces: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in pieces.items())
