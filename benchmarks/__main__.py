"""`python -m lowmem_bagel.benchmarks SUITE ...` is `lowmem-bagel bench SUITE ...`."""

import sys

from lowmem_bagel.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    main()
