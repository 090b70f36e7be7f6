"""Places that tests read."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
GOLDEN = DATA / "golden"
CHECKPOINT = GOLDEN / "checkpoint"
"""A small random model in the published layout. Not to be written to."""
RESULTS = ROOT / "benchmarks" / "results"
