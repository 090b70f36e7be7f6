"""Downloads, against servers on 127.0.0.1 that cut connections, lie, stall and refuse."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from support.command import INTERRUPTIBLE
from support.hub_server import COMMIT, Fault, HubServer, wait_until
from typer.testing import CliRunner

from lowmem_bagel.cli.download import DEFAULT_REPO, download_command
from lowmem_bagel.errors import DownloadError
from lowmem_bagel.hub.download import BAGEL_REPO, DISK_MARGIN, DownloadResult, Patience, Progress, download

HASTY = Patience(timeout=5.0, attempts=3, pause=0.01)
BIG, VAE, SMALL = "ema.safetensors", "ae.safetensors", "llm_config.json"
NEEDED = {BIG, VAE, SMALL, "vit_config.json", "merges.txt", "empty.json"}


pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    files = {
        BIG: random.randbytes(300_000),
        VAE: random.randbytes(50_000),
        SMALL: b'{"hidden_size": 8}',
        "vit_config.json": b'{"hidden_size": 4}',
        "merges.txt": b"a b\n",
        "empty.json": b"",
        "README.md": b"# Model",
        "pytorch_model.bin": b"\x80\x04K\x01.",
        "extras/notes.json": b"{}",
    }
    with HubServer(files) as server:
        yield server


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path) -> Callable[..., DownloadResult]:
    def fetch(**settings: Any) -> DownloadResult:
        return download(hub.repo, tmp_path / "out", **{"endpoint": hub.endpoint, "patience": HASTY, **settings})

    return fetch


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def actions(result: DownloadResult) -> dict[str, str]:
    return {file.name: file.action for file in result.files}


def test_stand_in_serves_the_hub_library_itself(hub: HubServer, tmp_path: Path) -> None:
    """The server is only worth testing against if huggingface_hub's own download is content with it."""
    from huggingface_hub import hf_hub_download

    for name in (SMALL, BIG):
        path = hf_hub_download(hub.repo, name, endpoint=hub.endpoint, local_dir=tmp_path)
        assert Path(path).read_bytes() == hub.files[name]
    assert "HEAD" in {request.method for request in hub.log}


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_fetches_what_a_checkpoint_needs_and_nothing_twice(
    source: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    result = fetch(source=source)
    assert contents(tmp_path / "out") == {name: hub.files[name] for name in NEEDED}
    assert result.revision == (COMMIT if source == "huggingface" else "master")
    assert result.received == sum(len(hub.files[name]) for name in NEEDED)
    assert set(actions(result).values()) == {"fetched"}

    asked = len(hub.log)
    again = fetch(source=source)
    assert set(actions(again).values()) == {"present"}
    assert again.received == 0
    assert len(hub.log) == asked + 1, "only the listing is asked for again"


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_connection_cut_in_mid_file_is_resumed_by_range(
    source: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(cut_after=100_000), Fault(cut_after=77_777)]
    result = fetch(source=source)
    assert (tmp_path / "out" / BIG).read_bytes() == hub.files[BIG]
    first, second, third = hub.transfers(BIG)
    assert (first.range, second.range, third.range) == (None, "bytes=100000-", "bytes=177777-")
    assert (first.sent, second.sent, third.sent) == (100_000, 77_777, 300_000 - 177_777)
    assert {file.name: file.received for file in result.files}[BIG] == 300_000


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_failed_download_leaves_a_part_that_the_next_call_resumes(
    source: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(cut_after=120_000), Fault(status=503), Fault(status=503)]
    with pytest.raises(DownloadError, match=rf"{BIG}: .* 503 .*resumes"):
        fetch(source=source)
    assert not (tmp_path / "out" / BIG).exists()
    (part,) = (tmp_path / "out").glob(f".download/{BIG}*.part")
    assert part.read_bytes() == hub.files[BIG][:120_000]

    hub.log.clear()
    result = fetch(source=source)
    (rest,) = hub.transfers(BIG)
    assert (rest.range, rest.sent) == ("bytes=120000-", 180_000)
    assert actions(result)[BIG] == "resumed"
    assert contents(tmp_path / "out") == {name: hub.files[name] for name in NEEDED}


def test_part_of_other_content_is_not_continued(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(cut_after=120_000)]
    with pytest.raises(DownloadError):
        fetch(patience=Patience(5.0, 1, 0.0))
    hub.files[BIG] = random.randbytes(300_000)
    hub.log.clear()
    fetch()
    assert [request.range for request in hub.transfers(BIG)] == [None]
    assert contents(tmp_path / "out") == {name: hub.files[name] for name in NEEDED}


def test_damaged_part_is_found_out_and_fetched_from_the_start(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(cut_after=120_000)]
    with pytest.raises(DownloadError):
        fetch(patience=Patience(5.0, 1, 0.0))
    (part,) = (tmp_path / "out").glob(f".download/{BIG}*.part")
    part.write_bytes(bytes(120_000))
    result = fetch()
    assert (tmp_path / "out" / BIG).read_bytes() == hub.files[BIG]
    assert {file.name: file.damaged for file in result.files}[BIG] == 1


@pytest.mark.parametrize(
    ("fault", "ranges"),
    [(Fault(ignore_range=True), [None, "bytes=120000-"]), (Fault(status=416), [None, None])],
)
def test_server_that_cannot_resume_sends_the_whole_file(
    fault: Fault, ranges: list[str | None], hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(cut_after=120_000), fault]
    (file,) = fetch(files=[BIG]).files
    assert (tmp_path / "out" / BIG).read_bytes() == hub.files[BIG]
    assert [request.range for request in hub.transfers(BIG)] == ranges
    assert (file.received, file.damaged) == (420_000, 0)


def test_wrong_range_is_refused(hub: HubServer, fetch: Callable[..., DownloadResult]) -> None:
    hub.faults[BIG] = [Fault(cut_after=120_000), Fault(shift_range=1)]
    with pytest.raises(DownloadError, match=f"wrong range of {BIG}"):
        fetch()


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("name", [BIG, SMALL])
def test_wrong_bytes_are_fetched_again(
    name: str, source: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    wrong = bytearray(hub.files[name])
    wrong[len(wrong) // 2] ^= 1
    hub.faults[name] = [Fault(content=bytes(wrong))]
    result = fetch(source=source)
    assert contents(tmp_path / "out") == {name: hub.files[name] for name in NEEDED}
    assert {file.name: file.damaged for file in result.files if file.damaged} == {name: 1}


@pytest.mark.parametrize("name", [BIG, SMALL])
def test_file_that_keeps_arriving_damaged_is_named_and_not_kept(
    name: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[name] = [Fault(content=random.randbytes(len(hub.files[name]))) for _ in range(2)]
    with pytest.raises(DownloadError, match=f"^{name} arrived damaged 2 times"):
        fetch()
    assert not [path for path in contents(tmp_path / "out") if name in path]


def test_longer_body_than_listed_does_not_grow_the_file(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(content=hub.files[BIG] + b"more")]
    (file,) = fetch(files=[BIG]).files
    assert (tmp_path / "out" / BIG).read_bytes() == hub.files[BIG]
    assert (file.received, file.damaged) == (300_000, 0)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_damaged_file_of_an_earlier_download_is_replaced(
    damage: Callable[[bytes], bytes], hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    fetch()
    target = tmp_path / "out" / VAE
    target.write_bytes(damage(hub.files[VAE]))
    result = fetch()
    assert target.read_bytes() == hub.files[VAE]
    assert {name for name, action in actions(result).items() if action != "present"} == {VAE}
    assert actions(result)[VAE] == "replaced"


class Usage(NamedTuple):
    """What shutil.disk_usage returns, in bytes."""

    total: int
    used: int
    free: int


def test_too_little_disk_is_refused_before_anything_is_written(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(len(hub.files[name]) for name in NEEDED)
    free = need + DISK_MARGIN - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))
    with pytest.raises(DownloadError, match="GB are free; free some space"):
        fetch()
    assert not (tmp_path / "out").exists()
    assert len(hub.log) == 1

    free += 1
    fetch()
    assert contents(tmp_path / "out").keys() == NEEDED


def test_disk_check_counts_only_what_is_missing(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults[BIG] = [Fault(cut_after=120_000)]
    with pytest.raises(DownloadError):
        fetch(workers=1, patience=Patience(5.0, 1, 0.0))  # the largest file is the last one
    free = 180_000 + DISK_MARGIN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    assert fetch().received == 180_000


def test_full_disk_is_said_and_resumable(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DownloadError, match="disk is full; free some space"):
            fetch(files=[BIG])
    assert not (tmp_path / "out" / BIG).exists()
    assert fetch(files=[BIG]).received == 0, "the part was complete"
    assert contents(tmp_path / "out") == {BIG: hub.files[BIG]}


def test_folder_that_is_a_file_is_an_error(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(DownloadError, match="out: cannot be read or written"):
        fetch()
    assert (tmp_path / "out").read_text() == "in the way"


def test_one_file(hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path) -> None:
    fetch(files=[VAE])
    assert contents(tmp_path / "out") == {VAE: hub.files[VAE]}
    fetch(files=["extras/notes.json", "README.md"])
    assert contents(tmp_path / "out").keys() == {VAE, "extras/notes.json", "README.md"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": ["nothing.json"]}, f"no file nothing.json; it has .*{BIG}"),
        ({"files": ["pytorch_model.bin"]}, "pytorch_model.bin is a pickle"),
        ({"revision": "v9"}, "no revision 'v9'; give a branch"),
        ({"revision": "v9", "source": "modelscope"}, "with a revision 'v9'"),
        ({"workers": 0}, "0 workers"),
        ({"source": "elsewhere"}, "unknown source 'elsewhere'; choose one of huggingface, modelscope"),
        ({"files": ["CON.json"]}, "no disk takes the file name 'CON.json'"),
        ({"files": [".download/lock"]}, "no disk takes the file name '.download/lock'"),
        ({"files": ["long" * 70 + ".json"]}, "no disk takes the file name 'long"),
        ({"endpoint": "hub.example.org"}, "write it as https://hub.example.org"),
    ],
)
def test_impossible_wishes(
    settings: dict[str, Any], message: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.files |= dict.fromkeys(("CON.json", ".download/lock", "long" * 70 + ".json"), b"{}")
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(**settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_chosen_revision_is_asked_for_and_pinned(hub: HubServer, fetch: Callable[..., DownloadResult]) -> None:
    hub.revisions += ("v1.0/rc",)
    assert fetch(revision="v1.0/rc").revision == COMMIT
    assert hub.log[0].path.startswith("/api/models/owner/model/revision/v1.0%2Frc")
    assert all(f"/resolve/{COMMIT}/" in r.path or "/content/" in r.path for r in hub.log[1:])


@pytest.mark.parametrize("repo", ["owner/other", "not a repo", "../escape", "a/b/c", "a/b--c", ""])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_no_such_repository(repo: str, source: Any, hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"no public repository (owner/other|a/b--c)|is not a repository; write it as"
    ):
        download(repo, tmp_path / "out", source=source, endpoint=hub.endpoint, patience=HASTY)
    assert not (tmp_path / "out").exists()


def test_repository_with_only_pickles_is_refused(hub: HubServer, fetch: Callable[..., DownloadResult]) -> None:
    del hub.files[BIG], hub.files[VAE]
    with pytest.raises(DownloadError, match=r"not a BAGEL checkpoint: its weights are pickles \(pytorch_model.bin\)"):
        fetch()
    assert not hub.transfers("pytorch_model.bin")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "HF_TOKEN"), (403, "refuses access"), (404, "check"), (429, "wait a few minutes"), (500, "answered 500")],
)
def test_refused_listing(
    status: int, message: str, source: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.api_status = status
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(source=source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("status", "message"), [(401, "refuses access"), (403, "HF_TOKEN"), (404, "does not have")])
def test_refused_file_is_not_asked_for_again(
    status: int, message: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(status=status)]
    with pytest.raises(DownloadError, match=rf"{message}.*"):
        fetch(files=[BIG])
    assert not (tmp_path / "out").exists()
    assert len([request for request in hub.log if "/content/" in request.path]) == 1


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_no_server_there(source: Any, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(DownloadError, match=r"cannot be reached \(.*refused.*\); check the network"):
            download("owner/model", tmp_path / "out", source=source, endpoint=endpoint, patience=HASTY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("listing", [b"[]", b"{}", b"<html>", b'{"Code": 200, "Data": null}'])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_server_that_is_no_hub(
    source: str, listing: bytes, hub: HubServer, fetch: Callable[..., DownloadResult]
) -> None:
    hub.raw_listing = listing
    with pytest.raises(DownloadError, match=f"does not answer as a {source} server|not a BAGEL checkpoint"):
        fetch(source=source)


@pytest.mark.parametrize(
    ("source", "lie", "message"),
    [
        ("huggingface", {"rfilename": "../../evil.json"}, "outside its repository"),
        ("huggingface", {"rfilename": "/etc/evil.json"}, "impossible file name"),
        ("huggingface", {"lfs": None, "blobId": None}, f"no checksum for {BIG}"),
        ("huggingface", {"lfs": None, "size": -1}, f"how large {BIG} is"),
        ("modelscope", {"Path": "a\\..\\evil.json"}, "impossible file name"),
        ("modelscope", {"Sha256": ""}, f"no checksum for {BIG}"),
        ("modelscope", {"Size": "12"}, f"how large {BIG} is"),
    ],
)
def test_listing_is_not_trusted(
    source: str,
    lie: dict[str, object],
    message: str,
    hub: HubServer,
    fetch: Callable[..., DownloadResult],
    tmp_path: Path,
) -> None:
    hub.listed[BIG] = lie
    with pytest.raises(DownloadError, match=message):
        fetch(source=source)
    assert not (tmp_path / "out").exists()


def test_stalled_server_is_given_up_and_resumed(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(silence=30.0)]
    fetch(patience=Patience(timeout=0.5, attempts=4, pause=0.01))
    stalled, rest = hub.transfers(BIG)
    assert rest.range == f"bytes={stalled.sent}-"
    assert 0 < stalled.sent < 300_000
    assert (tmp_path / "out" / BIG).read_bytes() == hub.files[BIG]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_bound_the_files_under_way(
    workers: int, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    names = [f"shard{i}.safetensors" for i in range(5)]
    for name in names:
        hub.files[name] = random.randbytes(10_000)
        hub.faults[name] = [Fault(bytes_per_second=40_000)]
    fetch(files=names, workers=workers)
    assert hub.busiest == workers
    assert contents(tmp_path / "out") == {name: hub.files[name] for name in names}


def test_token_goes_to_the_hub_and_not_to_the_content_network(
    hub: HubServer, fetch: Callable[..., DownloadResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(DownloadError, match="refuses access to owner/model; accept its conditions"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch()
    elsewhere = [request for request in hub.log if request.path.startswith("/content/")]
    assert len(elsewhere) == 2
    assert not any("secret" in str(request.headers) for request in elsewhere)


def test_endpoint_of_the_environment_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    with pytest.raises(DownloadError, match=r"^HF_ENDPOINT: 'hub.example.org' is not an endpoint"):
        download("owner/model", tmp_path / "out", patience=HASTY)


def test_endpoint_of_the_environment(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    result = download(hub.repo, tmp_path / "out", files=[SMALL], patience=HASTY)
    assert actions(result) == {SMALL: "fetched"}


def test_second_download_into_a_folder_is_refused(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(bytes_per_second=600_000)]
    refusals: list[str] = []

    def meddle(progress: Progress) -> None:
        if not refusals:
            with pytest.raises(DownloadError, match="another download into it is running") as caught:
                fetch()
            refusals.append(str(caught.value))

    fetch(on_progress=meddle)
    assert refusals
    assert contents(tmp_path / "out") == {name: hub.files[name] for name in NEEDED}


def test_progress_tells_every_file_to_its_end(hub: HubServer, fetch: Callable[..., DownloadResult]) -> None:
    hub.faults[BIG] = [Fault(cut_after=100_000)]
    seen: list[Progress] = []
    fetch(on_progress=seen.append)
    last = {(p.name, p.phase): p.done for p in seen}
    for name in NEEDED - {"empty.json"}:
        assert last[name, "download"] == last[name, "check"] == len(hub.files[name])
    assert all(0 <= p.done <= p.total for p in seen)


def test_exception_from_the_callback_stops_and_leaves_only_parts(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(bytes_per_second=200_000)]

    def refuse(progress: Progress) -> None:
        if progress.name == BIG and progress.done > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(files=[BIG], on_progress=refuse)
    left = contents(tmp_path / "out")
    del left[os.path.join(".download", "lock")]
    ((name, part),) = left.items()
    assert name.startswith(os.path.join(".download", BIG))
    assert 20_000 < len(part) < 300_000
    assert part == hub.files[BIG][: len(part)]
    assert fetch(files=[BIG]).received == 300_000 - len(part)
    assert contents(tmp_path / "out") == {BIG: hub.files[BIG]}


app = typer.Typer()
app.command()(download_command)


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_command_leaves_a_part_and_is_resumed(
    signal_number: signal.Signals, code: int, hub: HubServer, tmp_path: Path
) -> None:
    hub.faults[BIG] = [Fault(bytes_per_second=100_000)]
    out = tmp_path / "out"
    run = "import typer; from lowmem_bagel.cli.download import download_command; typer.run(download_command)"
    arguments = [hub.repo, str(out), "--endpoint", hub.endpoint, "--file", BIG]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE + run, *arguments], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(p.stat().st_size > 20_000 for p in out.glob(".download/*.part")), seconds=30)
    process.send_signal(signal_number)
    _, messages = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in messages
    if signal_number == signal.SIGINT:
        assert "the same command resumes" in messages
    assert not (out / BIG).exists()
    (part,) = out.glob(".download/*.part")
    had = part.read_bytes()
    assert had == hub.files[BIG][: len(had)]

    hub.log.clear()
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    (rest,) = hub.transfers(BIG)
    assert (rest.range, rest.sent) == (f"bytes={len(had)}-", 300_000 - len(had))
    assert contents(out) == {BIG: hub.files[BIG]}


def test_command_prints_the_next_commands(hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "my model"
    run = CliRunner().invoke(app, [hub.repo, str(out), "--endpoint", hub.endpoint], catch_exceptions=False)
    assert run.exit_code == 0
    assert f"{len(NEEDED)} files of owner/model at {COMMIT}" in run.stdout
    assert f"lowmem-bagel inspect '{out}'" in run.stdout
    assert f"--model '{out}'" in run.stdout
    assert contents(out).keys() == NEEDED


def test_command_prints_json(hub: HubServer, tmp_path: Path) -> None:
    hub.faults[BIG] = [Fault(content=random.randbytes(300_000))]
    arguments = [hub.repo, str(tmp_path / "out"), "--endpoint", hub.endpoint, "--source", "modelscope", "--json"]
    run = CliRunner().invoke(app, [*arguments, "--file", BIG, "--file", SMALL], catch_exceptions=False)
    record = json.loads(run.stdout)
    assert record["folder"] == str(tmp_path / "out")
    assert record["received"] == 600_000 + len(hub.files[SMALL])
    assert [(f["name"], f["action"], f["damaged"]) for f in record["files"]] == [
        (BIG, "fetched", 1),
        (SMALL, "fetched", 0),
    ]


def test_command_lets_the_users_mistake_through(hub: HubServer, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["owner/other", str(tmp_path / "out"), "--endpoint", hub.endpoint])
    assert isinstance(run.exception, DownloadError)


def test_default_repository_is_one() -> None:
    assert DEFAULT_REPO == BAGEL_REPO
