"""`python -m fagen`."""

import sys

from fagen.cli import main

if __name__ == "__main__":
    sys.exit(main())
