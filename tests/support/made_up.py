"""Distributions that are not installed but can be found: a module and its entry points in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from support.forked import Forked


class Distribution:
    """A distribution `made-up` with one module, `made_up`, for processes that have it on their path.

    `points` maps a group below `lowmem_bagel.` to what it registers: names to attributes of the module.
    """

    def __init__(self, folder: Path, source: str, points: Mapping[str, Mapping[str, str]]) -> None:
        self.folder = folder
        info = folder / "made_up-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / "made_up.py").write_text(source)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        lines = []
        for group, named in points.items():
            lines += [
                f"[lowmem_bagel.{group}]",
                *(f"{name} = made_up:{attribute}" for name, attribute in named.items()),
            ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    def python(self, code: str, *arguments: object) -> str:
        """What the code prints, run by an interpreter that finds the distribution; it must succeed."""
        ran = Forked(code, arguments, path=[self.folder], folder=self.folder).finished()
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def command(self, *arguments: object) -> str:
        """What `lowmem-bagel` prints with these arguments."""
        return self.python("from lowmem_bagel.cli import main; main()", *arguments)
