"""Gradio writes no stubs when our page imports it, and those of components that come later."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.forked import MODEL, Forked

pytest.importorskip("gradio")
PROGRAM = """
import ast, sys
parsed = []
ast.parse = lambda source, *rest, parse=ast.parse, **more: parsed.append(source) or parse(source, *rest, **more)
from lowmem_bagel.serve.page.imported import gradio
print(sum("class Textbox(" in str(source) for source in parsed))
import made
print(made.Made().value, sum("class Made(" in str(source) for source in parsed) > 0)
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("lowmem_bagel.serve")]
"""
COMPONENT = "import gradio\n\n\nclass Made(gradio.Textbox):\n    pass\n"


def test_stubs_are_left_out_of_the_import_alone(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(COMPONENT)
    ran = Forked(PROGRAM, imported=MODEL, path=[tmp_path]).finished()
    assert (ran.returncode, ran.stdout) == (0, "0\nNone True\n"), ran.stderr
    assert (tmp_path / "made.pyi").exists()
