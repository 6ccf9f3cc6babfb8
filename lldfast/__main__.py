"""`lldfast <command>` and `python -m lldfast <command>`."""

import sys

from lldfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
