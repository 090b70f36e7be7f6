"""The demo checkpoints: BAGEL's architecture at a small size, trained by `benchmarks/demo` to draw coloured shapes."""

from pathlib import Path

FOLDER = Path(__file__).parent
FRAMES = FOLDER / "frames"
"""The one that has also learnt clips, views and pictures in the middle of an answer."""
