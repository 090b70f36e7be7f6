"""A `worker` process from outside: asked, waited for, and what became of it when it ended."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from lowmem_bagel.errors import SettingError, printable

START_SECONDS = 600.0
MODULE = "lowmem_bagel.benchmarks.report.worker"
SIGKILL = 9
VMSTAT = Path("/proc/vmstat")


class Ended(Exception):
    """The process ended, or was ended, without an answer.

    Attributes:
        memory: whether the host's memory had run out.
    """

    def __init__(self, why: str, memory: bool) -> None:
        super().__init__(why)
        self.memory = memory


class Child:
    """One worker, started when it is first asked and again after it ended.

    Args:
        begin: what every process is asked first.

    Attributes:
        used: whether the process has measured or made anything.
    """

    def __init__(self, begin: dict[str, Any]) -> None:
        self.begin = begin
        self.used = False
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this

    def ask(self, do: str, seconds: float = START_SECONDS, **what: Any) -> dict[str, Any]:
        """The answer.

        Raises:
            SettingError: the worker refuses what is asked.
            Ended: there is none, because the process ended or took longer than `seconds`.
        """
        if self._process is None:
            self._start()
            self._asked({"do": "start", **self.begin}, START_SECONDS)
        self.used = self.used or do != "expect"
        return self._asked({"do": do, **what}, seconds)

    def hello(self) -> dict[str, Any]:
        """What a fresh process answers to `begin`."""
        self.stop()
        self._start()
        return self._asked({"do": "start", **self.begin}, START_SECONDS)

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None
        self.used = False

    def close(self) -> None:
        self.stop()
        self._log.close()

    def _start(self) -> None:
        self._log.seek(0)
        self._log.truncate()
        self._kills = _kills()
        # A session of its own: Ctrl-C is for the one who asks, which then ends this process.
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, encoding="utf-8", start_new_session=True,
        )  # fmt: skip

    def _asked(self, what: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Timer(seconds, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            self.stop()  # whoever interrupts the wait leaves nothing measuring behind
            raise
        finally:
            in_time = late.is_alive()
            late.cancel()
        if not line:
            raise self._ended(None if in_time else seconds)
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise SettingError(answer["refused"])
        return answer

    def _ended(self, late: float | None) -> Ended:
        assert self._process is not None
        code = self._process.wait()
        self.stop()
        if late is not None:
            return Ended(f"it was ended after {late:.0f} seconds without a result", memory=False)
        if code == -SIGKILL and _kills() > self._kills:
            return Ended("the host's memory ran out, and the system ended the process", memory=True)
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return Ended(f"the process {how}{self._last_words()}", memory=False)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f": {printable(said[-1], 300)}" if said else ""


def _kills() -> int:
    """How many processes this system has ended for want of memory, as far as it tells."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
