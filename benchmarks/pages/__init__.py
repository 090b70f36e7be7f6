"""The pages that are made from the records in `benchmarks/results`."""

from .kernels import KERNELS
from .older_gpus import OLDER_GPUS
from .performance import PERFORMANCE, README

PAGES = (PERFORMANCE, KERNELS, OLDER_GPUS, README)
