"""Many requests from a file: each done once, whatever ends a run in between."""
