"""`python -m cfsp` is the same as `cfsp`."""

import sys

from cfsp.cli import main

if __name__ == "__main__":
    sys.exit(main())
