"""A real server under load: bounded, nothing lost, its memory flat; clients that leave; and its own leaving."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import crowd
from support.forked import SERVER, Forked
from support.serving import PROMPT, ServerProcess, server_process, until

QUEUE = 8
ANSWER = crowd.BODY
LONG = {"prompt": PROMPT, "size": "32x32", "num_timesteps": 5000, "seed": 1}
PICTURES = "/v1/images/generations"
REFUSED = 'http_responses_total{code="429"}'


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process("--no-page", "--queue", QUEUE) as running:
        yield running


def crowd_of(server: ServerProcess, requests: int, clients: int, tries: int = 1) -> list[tuple[int, str | None, bool]]:
    ran = Forked(Path(crowd.__file__).read_text(), (server.url, requests, clients, tries), imported=SERVER).finished()
    assert ran.returncode == 0, ran.stderr
    return [tuple(got) for got in json.loads(ran.stdout)]


def metrics(server: ServerProcess, *names: str) -> list[float]:
    """At one moment."""
    lines = server.ask("/metrics").body.decode().splitlines()
    return [sum(float(line.split()[-1]) for line in lines if line.startswith(f"lowmem_bagel_{one}")) for one in names]


def metric(server: ServerProcess, name: str) -> float:
    return metrics(server, name)[0]


def running(server: ServerProcess) -> bool:
    return bool(server.ask("/health").json["running"])


def post(path: str, body: bytes, more: int = 0) -> bytes:
    """A request whose body may be said to have more bytes than are sent."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) + more}\r\n\r\n"
    ).encode() + body


def test_two_hundred_at_once_each_get_an_answer_or_a_time_to_come_again(server: ServerProcess) -> None:
    """While a long picture holds the device, the queue fills; then it goes, and who waited is answered."""
    with socket.create_connection(("127.0.0.1", server.port)) as holding, ThreadPoolExecutor() as pool:
        holding.sendall(post(PICTURES, json.dumps({**LONG, "num_timesteps": 2000}).encode()))
        until(lambda: running(server))
        refused_before = metric(server, REFUSED)
        crowding = pool.submit(crowd_of, server, requests=200, clients=200)
        lengths = [0.0]

        def all_refused() -> bool:
            length, refused = metrics(server, "queue_length", REFUSED)
            lengths.append(length)
            return refused - refused_before == 200 - QUEUE

        until(all_refused, pause=0.1)
        holding.close()
        got = crowding.result(60)
    answered = [whole for status, _, whole in got if status == 200]
    refused = [retry_after for status, retry_after, _ in got if status == 429]
    assert (len(answered), len(refused)) == (QUEUE, 200 - QUEUE)
    assert all(answered)
    assert all(1 <= int(seconds or 0) <= 900 for seconds in refused)
    assert max(lengths) == QUEUE
    until(lambda: not running(server))
    assert metric(server, "queue_length") == 0


def test_whoever_comes_again_is_answered_and_memory_stays_flat(server: ServerProcess) -> None:
    def answered(requests: int) -> int:
        return sum(whole for *_, whole in crowd_of(server, requests, clients=QUEUE + 4, tries=1000))

    assert answered(50) == 50
    before = server.rss()
    assert answered(150) == 150
    assert server.rss() - before < 12e6


STREAMED = json.dumps({**LONG, "stream": True, "partial_images": 2}).encode()
WRITTEN = json.dumps({**ANSWER, "max_tokens": 4, "stream": True}).encode()


@pytest.mark.parametrize(
    ("sent", "wait"),
    [
        (b"", 0.0),
        (b"POST /v1", 0.0),
        (post(PICTURES, b'{"prompt"', more=100), 0.1),
        (post(PICTURES, json.dumps(LONG).encode()), 0.0),
        (post(PICTURES, json.dumps(LONG).encode()), 0.5),
        (post(PICTURES, STREAMED), 0.0),
        (post(PICTURES, STREAMED), 0.5),
        (post("/v1/chat/completions", WRITTEN), 0.0),
        (post("/v1/images/edits", b"--x\r\n", more=1000), 0.1),
        (
            post(
                "/sdapi/v1/txt2img", json.dumps({"prompt": PROMPT, "steps": 5000, "width": 32, "height": 32}).encode()
            ),
            0.5,
        ),
    ],
)
@pytest.mark.parametrize("abrupt", [False, True])
def test_who_hangs_up_takes_his_job_with_him(server: ServerProcess, sent: bytes, wait: float, abrupt: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(sent)
        time.sleep(wait)
        if abrupt:  # a reset in place of an end
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: not running(server), 10)
    answer = server.ask("/v1/chat/completions", ANSWER)
    assert answer.status == 200
    assert server.process.poll() is None


def test_one_who_waits_and_hangs_up_leaves_the_queue(server: ServerProcess) -> None:
    body = post(PICTURES, json.dumps(LONG).encode())
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    for client in clients:
        client.sendall(body)
    until(lambda: metric(server, "queue_length") == 2)
    for client in clients:
        client.close()
    until(lambda: metric(server, "queue_length") == 0 and not running(server), 10)


def in_threads(server: ServerProcess, bodies: list[dict[str, Any]]) -> tuple[list[threading.Thread], list[Any]]:
    """Pictures asked for one after the other, and what came of each."""
    found: list[Any] = [None] * len(bodies)

    def ask(index: int) -> None:
        try:
            found[index] = server.ask(PICTURES, bodies[index])
        except OSError as error:
            found[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
    for count, thread in enumerate(threads):
        thread.start()
        until(lambda count=count: running(server) and server.ask("/health").json["queue"]["waiting"] == count)
    return threads, found


def test_a_signal_under_load_finishes_what_runs_and_refuses_who_waits() -> None:
    with server_process("--no-page") as server:
        threads, found = in_threads(server, [{**LONG, "num_timesteps": 150}, LONG, LONG, LONG])
        server.signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert server.ended(20) == 0
    finished, *refused = found
    assert finished.status == 200
    assert finished.json["data"][0]["b64_json"]
    for answer in refused:
        assert (answer.status, int(answer.headers["retry-after"])) == (503, 30)
        assert "shutting down" in answer.json["error"]["message"]
    assert not [line for line in server.err if "Traceback" in line], server.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_what_runs(number: int) -> None:
    with server_process("--no-page") as server:
        threads, found = in_threads(server, [LONG])
        server.signal(number)
        time.sleep(0.3)
        assert server.process.poll() is None, "the first lets it run"
        server.signal(number)
        threads[0].join(20)
        assert server.ended(20) == 0
    assert (found[0].status, found[0].headers["retry-after"]) == (503, "30")
    assert not [line for line in server.err if "Traceback" in line], server.err
