"""The ways of other packages to multiply by our files' weights: what `--backend bitsandbytes|quanto|dfloat11` chooses.

They are registered as entry points of `lowmem_bagel.ways`. No torch.
"""

from __future__ import annotations

from lowmem_bagel.formats.dfloat11.spec import AT_LOAD, AT_USE
from lowmem_bagel.formats.int8.spec import SCRATCH
from lowmem_bagel.formats.spec import Way

HERE = "lowmem_bagel.benchmarks.baselines"

BITSANDBYTES, PACKAGE = ("bitsandbytes", "bitsandbytes"), ("dfloat11", "dfloat11")

INT8_BITSANDBYTES = "int8", Way(
    "bitsandbytes", f"{HERE}.int8:bitsandbytes", "bitsandbytes", by_name=True, says="asked for", weights="dequantized",
    scratch=SCRATCH, package=BITSANDBYTES,
)  # fmt: skip
INT8_QUANTO = "int8", Way(
    "quanto", f"{HERE}.int8:quanto", "quanto", by_name=True, says="asked for", weights="dequantized",
    scratch=SCRATCH, package=("optimum.quanto", "optimum-quanto"),
)  # fmt: skip
NF4_BITSANDBYTES = "nf4", Way(
    "bitsandbytes", f"{HERE}.nf4:bitsandbytes", "bitsandbytes", by_name=True,
    says="each weight is dequantised, then multiplied", weights="dequantized", scratch=SCRATCH,
    package=BITSANDBYTES,
)  # fmt: skip
DFLOAT11 = "dfloat11", Way(
    "package", f"{HERE}.dfloat11:package", "dfloat11", AT_USE, by_name=True, weights="decoded at use",
    says="compressed in memory, decoded at every use", package=PACKAGE,
)  # fmt: skip
DFLOAT11_AT_LOAD = "dfloat11", Way(
    "at load, package", "lowmem_bagel.formats.dfloat11.ways:at_load", "dfloat11", by_name=True, says=AT_LOAD,
    weights="decoded at load", adds=True, package=PACKAGE,
)  # fmt: skip
