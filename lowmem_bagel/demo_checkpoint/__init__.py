"""The demo checkpoint: BAGEL's architecture at a small size, trained by `benchmarks/demo` to draw coloured shapes."""

from pathlib import Path

FOLDER = Path(__file__).parent
