"""`lowmem-bagel serve` in a process of its own: it comes up, refuses what cannot be, and leaves as it was told."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from support.paths import CHECKPOINT
from support.serving import fork, server_process, spawn


def refused(*arguments: object, key: str = "") -> str:
    """The line of a server that does not begin."""
    ended = fork(*arguments, key=key).finished()
    return refusal(ended.returncode, ended.stdout, ended.stderr)


def refusal(code: int, out: str, err: str) -> str:
    lines = [line for line in err.splitlines() if not line.startswith("Using the embedded")]
    assert (code, len(lines)) == (2, 1), err
    assert lines[0].startswith("lowmem-bagel: ")
    return lines[0].removeprefix("lowmem-bagel: ") + out


def test_it_loads_tells_and_leaves() -> None:
    with server_process("--no-page") as server:
        health = server.ask("/health")
        assert health.status == 200
        assert health.json["queue"] == {"waiting": 0, "limit": 16}
        assert 0 < health.json["loading"]["bytes"] == health.json["loading"]["total_bytes"]
        server.signal(signal.SIGTERM)
        assert server.ended(10) == 0
    assert not [line for line in server.err if "Traceback" in line], server.err


def test_it_answers_before_it_is_loaded() -> None:
    with server_process("--no-page", ready=False, start=spawn) as server:
        first = server.ask("/health")
        assert first.status == 503
        assert first.json["status"] == "loading"
        assert int(first.headers["retry-after"]) > 0
        server.signal(signal.SIGINT)
        assert server.ended(20) == 0
    assert not [line for line in server.err if "Traceback" in line], server.err


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use; choose another" in refused("--port", port)


def test_hosts_that_are_none() -> None:
    assert "unknown host 'no.such.host.invalid'" in refused("--host", "no.such.host.invalid", key="k" * 16)
    assert "192.0.2.1 is no address of this machine" in refused("--host", "192.0.2.1", key="k" * 16)


def test_nothing_listens_beyond_this_machine_without_a_key() -> None:
    """Said by an interpreter of its own, as a person has it."""
    process = spawn("--host", "0.0.0.0")
    out, err = process.communicate(timeout=60)
    assert "set an API key" in refusal(process.returncode, out, err)


def test_a_folder_that_is_none_ends_it_before_it_listens(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    for path in (folder, tmp_path / "nothing-here"):
        said = refused(path)
        assert str(path) in said
        assert "Listening" not in said


def test_a_model_that_cannot_be_loaded_ends_it() -> None:
    ended = fork("--max-ram", "1MB", "--no-page").finished()
    assert "Listening" in refusal(ended.returncode, ended.stdout, ended.stderr)


def imported_with(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_it_listens_before_anything_slow_is_imported_and_has_its_routes_before_torch() -> None:
    assert not {"torch", "numpy", "gradio", "fastapi"} & imported_with("lowmem_bagel.serve.server")
    assert not {"torch", "gradio"} & imported_with("lowmem_bagel.serve.app")
