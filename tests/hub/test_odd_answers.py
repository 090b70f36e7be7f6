"""Hubs that answer anything at all: thousands of mutated answers, and nothing but our own error comes of them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from support.fuzz import Tally, keep, watched
from support.hub_server import COMMIT, git_sha1
from support.raw_server import reply

from lowmem_bagel.errors import DownloadError, UserError
from lowmem_bagel.hub import web
from lowmem_bagel.hub.download import Patience, download

CASES, SEED = int(os.environ.get("FUZZ_INPUTS", "500")), int(os.environ.get("FUZZ_SEED", "22"))
"""More of them by hand, and a record: see `support.fuzz`."""
HASTY = Patience(0.5, 2, 0.0)
HEAD = json.dumps({"vae2llm.weight": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
STORED = len(HEAD).to_bytes(8, "little") + HEAD + bytes(3000)
AROUND = {"vit_config.json": b"{}", "tokenizer.json": b"{}", "ae.safetensors": b"vae"}
PLAIN = {"llm_config.json": b'{"hidden_size": 8}', "ema.safetensors": STORED, **AROUND}
LOOKED_INTO = {
    "config.json": b'{"llm_config": {"hidden_size": 8}}',
    "model.safetensors.index.json": b'{"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}',
    "first.safetensors": STORED,
    "second.safetensors": STORED[:-1],
    **AROUND,
}
"""A repository whose index, configuration and heads are looked into before anything is fetched."""
TEXTS = [
    "", ".", "..", "/", "a/../b", "../x.json", "/etc/x.json", "a\\b", "a\0b", "\udc80.json", "\ud800", "x" * 300, "C:x",
    "é" * 130, "a/" * 2000, "CON", "a\nb", "\u202e.json", "\x1b[2J", "NaN", "-1", "llm_config.json/x", " ", "١" * 64,
    "ema.safetensors", ".download/lock", "sha256", "0" * 40, "f" * 64, "g" * 64, "http://[", "\U0010ffff",
]  # fmt: skip
NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**19, 10**400, 1e308, float("inf"), float("nan"), -0.0, 3000.0, True, False, None]
ODD_BYTES = [
    b"",
    b"\0",
    b"\r\n",
    b"\r\n\r\n",
    b"\xff\xfe",
    b"HTTP/1.1 ",
    b"Content-Length: 5\r\n",
    b"\n",
    b"[" * 3000,
    b"-",
    b"9" * 30,
]
LOCATIONS = [
    "", "/", "http://[", "http://[::1", "ftp://h/", "http://h:99999/", "http://\udcff/", "//", "http://a b/", "\\", "?",
    "https://" + "x" * 5000, "http://h/\0", "file:///etc/passwd", "javascript:1", "http://h:h/", "#",
]  # fmt: skip
STATUSES = [
    *["200 OK"] * 5, "206 Part", "302 Found", "307 There", "401 No", "403 No", "404 No", "407 Proxy", "416 Range",
    "429 Wait", "500 Oh", "100 Go", "101 Switch", "204 None", "999 ?",
]  # fmt: skip


class Network(httpcore2.NetworkBackend):
    """Each connection is answered in pieces, given the head of its request."""

    def __init__(self, answer: Callable[[bytes], list[bytes]]) -> None:
        self._answer = answer

    def connect_tcp(self, *given: Any, **named: Any) -> httpcore2.NetworkStream:
        return Stream(self._answer)


class Stream(httpcore2.NetworkStream):
    def __init__(self, answer: Callable[[bytes], list[bytes]]) -> None:
        self._answer = answer
        self._asked = b""
        self._pieces: list[bytes] | None = None

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._asked += buffer

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._pieces is None:
            self._pieces = self._answer(self._asked)
        return self._pieces.pop(0) if self._pieces else b""

    def close(self) -> None:
        pass


def listing(source: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    if source == "modelscope":
        found = [
            {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        ]
        return {"Code": 200, "Data": {"Files": found}, "Message": "success"}
    siblings: list[dict[str, Any]] = [
        {"rfilename": name, "size": len(data), "blobId": git_sha1(data)} for name, data in files.items()
    ]
    for sibling, data in zip(siblings, files.values(), strict=True):
        if len(data) > 2000:
            sibling["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return {"id": "owner/model", "sha": COMMIT, "siblings": siblings, "gated": False}


def odd(random: random.Random) -> Any:
    value = random.choice(
        [random.choice(TEXTS), random.choice(NUMBERS), [], {}, [[]], {"": None}, "[" * 10, b"".decode()]
    )
    return [value] * random.randrange(3) if random.random() < 0.2 else value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside."""
    for key, inside in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inside, (dict, list)):
            yield from places(inside)


def spoiled(value: Any, random: random.Random) -> Any:
    """A listing with some of its values replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        container, key = random.choice(list(places(value)) or [(value, None)])
        if key is None:
            return odd(random)
        what = random.randrange(4)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif what == 2 and isinstance(container, dict):
            container[random.choice([*TEXTS, *container])] = container[key]
        else:
            container[key] = odd(random)
    return odd(random) if random.random() < 0.02 else value


def mangled(answer: bytes, random: random.Random) -> bytes:
    """Bytes cut, doubled, overwritten or pushed in."""
    data = bytearray(answer)
    for _ in range(random.choice([1, 1, 2, 4])):
        at, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
        what = random.randrange(4)
        if what == 0:
            del data[at:end]
        elif what == 1:
            data[at:at] = random.choice(ODD_BYTES)
        elif what == 2:
            data[at : at + 1] = random.randbytes(1)
        else:
            data[at:at] = data[at:end][:2000]
    return bytes(data)


def answer_to(good: bytes, random: random.Random) -> bytes:
    """An answer with this body, or what might come in its place."""
    status = random.choice(STATUSES)
    headers = {"Location": random.choice(LOCATIONS)} if status[0] == "3" else {}
    if random.random() < 0.2:
        headers["Content_Range"] = random.choice(
            ["bytes 0-", "bytes 9-", "bytes -", "bytes " + "9" * 400 + "-", "", "\udcff"]
        )
    if random.random() < 0.1:
        headers["X_Error_Code"] = random.choice(
            ["GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound", "\udc80"]
        )
    if random.random() < 0.05:
        headers["Content_Encoding"] = random.choice(["gzip", "identity", "br", ""])
    body = mangled(good, random) if random.random() < 0.3 else good
    whole = reply(body, status, **headers)
    return mangled(whole, random) if random.random() < 0.2 else whole


def answers(source: str, random: random.Random) -> Callable[[bytes], list[bytes]]:
    """How a hub answers that has odd moments, in its listing, in its files, or in both."""
    files = random.choice([PLAIN, LOOKED_INTO])
    odd_listing, odd_files = random.random() < 0.7, random.random() < 0.6

    def answer(head: bytes) -> list[bytes]:
        if b" /api/" in head and b"FilePath" not in head:
            said = spoiled(listing(source, files), random) if odd_listing else listing(source, files)
            good = json.dumps(said).encode()
            if random.random() < 0.02:
                good = b"[" * 10**5 + good
            is_odd = odd_listing and random.random() < 0.3
        else:
            named = [data for name, data in files.items() if head.partition(b" HTTP")[0].endswith(name.encode())]
            good = named[0] if named else b"{}"
            is_odd = odd_files and random.random() < 0.6
        whole = answer_to(good, random) if is_odd else reply(good)
        at = random.randrange(len(whole) + 1)
        return [piece for piece in (whole[:at], whole[at:]) if piece]

    return answer


@pytest.fixture
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.usefixtures("_plain_environment")
def test_whatever_a_hub_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login is looked for
    outcomes: dict[str, int] = {"fetched": 0, "refused": 0}
    tally, before = Tally("hubs' answers", SEED, CASES), peak_kib()
    for case in range(CASES):
        chance = random.Random(f"{SEED} {case}")
        source: Any = chance.choice(["huggingface", "modelscope"])
        script = answers(source, chance)
        monkeypatch.setattr(web, "TimedNetwork", lambda limit, script=script: Network(script))
        started = time.monotonic()
        with watched(tmp_path) as seen:
            outcome = attempt(tmp_path / "inside" / "out", source, f"seed {SEED}, case {case}")
        assert seen == [], case
        taken = time.monotonic() - started
        assert taken < 5, case
        tally.seconds, tally.worst_seconds = tally.seconds + taken, max(tally.worst_seconds, taken)
        outcomes[outcome] += 1
        shutil.rmtree(tmp_path / "inside", ignore_errors=True)
        assert not list(tmp_path.iterdir()), case
    assert min(outcomes.values()) > CASES / 20, outcomes
    tally.refused, tally.peak_bytes = outcomes["refused"], (peak_kib() - before) * 1024
    keep(tally)


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def attempt(out: Path, source: Any, case: str) -> str:
    try:
        result = download("owner/model", out, source=source, endpoint="http://h", workers=1, patience=HASTY)
    except DownloadError as error:
        check_line(error, case)
        return "refused"
    except BaseException as error:
        error.add_note(case)
        raise
    for file in result.files:
        assert (out / file.name).resolve().is_relative_to(out.resolve()), case
        assert (out / file.name).stat().st_size == file.size, case
    assert {path.name for path in out.parent.iterdir()} == {"out"}, case
    return "fetched"


def check_line(error: UserError, case: object) -> None:
    """One line that a terminal can show, of bearable length, without a password."""
    assert str(error).isprintable(), (case, str(error))
    assert 10 < len(str(error)) < 1500, (case, str(error))
    assert "hunter2" not in str(error), (case, str(error))


def odd_text(random: random.Random) -> str:
    """What might stand where a name, an address or a version is asked for."""
    known = [b"http://me:hunter2@[::1]:80/path", b"socks5h://me:hunter2@proxy.org:1080", b"owner/model/stage_2@main"]
    kind = random.randrange(4)
    if kind == 0:
        return random.choice(TEXTS)
    if kind == 1:
        ranges = [(0, 128), (0xD800, 0xE000), (0, 0x110000)]
        return "".join(chr(random.randrange(*random.choice(ranges))) for _ in range(random.randrange(9)))
    text = mangled(random.choice(known), random).decode("utf-8", "surrogateescape")
    return text if "@" in text.rpartition("hunter2")[2] else text.replace("hunter2", "")  # a password no more


@pytest.mark.usefixtures("_plain_environment")
def test_whatever_is_asked_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "TimedNetwork", lambda limit: Network(lambda head: [reply(b"{}")]))
    for case in range(CASES):
        chance = random.Random(f"{SEED} {case}")
        asked: dict[str, Any] = {"repo": "owner/model", "source": chance.choice(["huggingface", "modelscope"])}
        for name in chance.sample(["repo", "endpoint", "revision", "files"], chance.choice([1, 1, 2])):
            asked[name] = [odd_text(chance)] if name == "files" else odd_text(chance)
        proxy = odd_text(chance).replace("\0", "") if chance.random() < 0.3 else ""
        with monkeypatch.context() as patch:
            patch.setenv("ALL_PROXY", proxy.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"))
            with pytest.raises(UserError) as caught:
                download(folder=tmp_path / "out", **{"endpoint": "http://h", "patience": HASTY, **asked})
        check_line(caught.value, (case, asked, proxy))
        assert not list(tmp_path.iterdir()), (case, asked)
