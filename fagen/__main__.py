"""`python -m fagen`."""

import sys

from fagen.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
