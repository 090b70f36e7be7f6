"""Imported by what forks: the codecs' compiled loops, loaded and used once, so that children need not wait for them."""

from __future__ import annotations

import numpy as np

from lowmem_bagel.formats import compiled
from lowmem_bagel.formats.int8 import loops

BITS = np.zeros((1, 64), np.uint16)

compiled.peak(BITS[0])
loops.encode(BITS, np.empty((1, 64), np.int8), np.empty(1, np.float32), np.zeros(2))
