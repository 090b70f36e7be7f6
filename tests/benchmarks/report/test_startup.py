"""`bench startup` accounts for every second of a process, tells what failed, and its folders load as any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.report import startup
from lowmem_bagel.benchmarks.written import write_folder

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import SettingError

SAYS = """
import json, os, sys, time
began = time.time()
time.sleep(0.05)
assert os.environ["XDG_CACHE_HOME"] in sys.argv[sys.argv.index("--out") + 1], "the caches are this measurement's own"
startup = {"began": began, "phases": {"weights": 0.02}, "reached": {"first step": 0.03, "picture": 0.05},
           "read_bytes": 7}
print(json.dumps({"startup": startup, "stats": {"denoise": {"seconds": 0.01}}}))
"""


def test_the_phases_add_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMAND", (sys.executable, "-c", SAYS))
    (tmp_path / "model.safetensors").write_bytes(bytes(100_000))
    found = startup.measure_startup(tmp_path, ("--flag",), repeat=1)
    for state in ("cold", "warm"):
        phases = found[state]
        assert phases["whole"] == pytest.approx(sum(phases.values()) - phases["whole"], abs=1e-6)
        assert phases["weights"] == 0.02 and phases["denoise"] == 0.01
        assert 0.03 < found[f"{state}_first_step"] < phases["whole"]
        assert found["bytes_per_second"][state] > 0
    assert (found["stored_bytes"], found["read_bytes"], len(found["runs"])) == (100_000, 7, 2)
    assert all(name in "\n".join(startup.lines("int8", found)) for name in ("int8, cold", "int8, warm", "weights"))


def test_a_command_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('no such\\nmodel here')"))
    with pytest.raises(SettingError, match="the command failed: model here"):
        startup.started(tmp_path, (), tmp_path)


def test_what_the_page_cache_has_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    assert startup.cached_share([file]) == 1.0
    assert startup.read_speed([file, file], threads=2) > 0
    startup.drop([file])
    assert file.stat().st_size == 1 << 20


@pytest.mark.parametrize("format", ["source", "int8", "nf4", "dfloat11"])
def test_random_weights_on_disk_load_as_any_folder(tmp_path: Path, format: str) -> None:
    folder = write_folder(format, "tiny", tmp_path / "model", "cpu")
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", tasks=("generate",))
    assert pipe.model.folder.format == format
    pipe.close()
