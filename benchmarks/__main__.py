"""`python -m lowmem_bagel.benchmarks SUITE ...` is `lowmem-bagel bench SUITE ...`."""

import sys

from lowmem_bagel.cli import main

sys.argv[1:1] = ["bench"]
main()
