"""python -m lamamba: the same as the command lamamba."""

import sys

from lamamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
