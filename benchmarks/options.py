"""Options that several benchmarks have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Shape = Annotated[str, typer.Option(help="bagel-7b, bagel-moe-7b; tiny or tiny-moe to try a benchmark out.")]
Size = Annotated[int, typer.Option(help="Height and width in pixels.")]
Timesteps = Annotated[int, typer.Option(help="Timesteps a picture.")]
Out = Annotated[Path, typer.Option(help="JSON record to write.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.")]
CheckOnly = Annotated[bool, typer.Option("--check-only", help="Compare with the references, and time nothing.")]
Threads = Annotated[int, typer.Option(help="Kernels compiled at a time.")]
