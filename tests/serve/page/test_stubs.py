"""Gradio writes no stub beside a component's source where our page imports it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.forked import SERVER, Forked

pytest.importorskip("gradio")
COMPONENT = "import gradio\n\n\nclass Made(gradio.Textbox):\n    pass\n"


def test_no_stub_is_written(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(COMPONENT)
    ran = Forked("import made; print(made.Made().value)", imported=SERVER, path=[tmp_path]).finished()
    assert (ran.returncode, ran.stdout) == (0, "None\n"), ran.stderr
    assert not (tmp_path / "made.pyi").exists()
