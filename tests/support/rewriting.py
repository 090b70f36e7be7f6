"""The rewriting of asserts in tests, shared by the workers of pytest-xdist.

In a fresh checkout it takes longer than all imports, and each worker did it for all files. pytest keeps what it rewrote
beside the file, and whoever comes later takes it from there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.assertion import rewrite


def rewrite_share(config: pytest.Config) -> None:
    """Of the files that nobody has rewritten yet those that fall to this worker, before it collects."""
    worker = getattr(config, "workerinput", None)
    if worker is None or sys.dont_write_bytecode or rewrite.assertstate_key not in config.stash:
        return
    state, number = config.stash[rewrite.assertstate_key], int(worker["workerid"].removeprefix("gw"))
    for path in [*test_files(config)][number :: worker["workercount"]]:
        folder = rewrite.get_cache_dir(path)
        kept = folder / (path.name.removesuffix(".py") + rewrite.PYC_TAIL)
        if not kept.exists() and rewrite.try_makedirs(folder):
            with contextlib.suppress(SyntaxError):  # the collection will tell
                source, code = rewrite._rewrite_test(path, config)
                rewrite._write_pyc(state, code, source, kept)


def test_files(config: pytest.Config) -> Iterator[Path]:
    """Of the folders that were asked for, in one order in every worker."""
    for given in config.args:
        yield from sorted((config.invocation_params.dir / given).rglob("test_*.py"))
