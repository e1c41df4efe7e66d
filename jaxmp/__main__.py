"""`python -m jaxmp`, the same as `jaxmp`."""

import sys

from jaxmp.cli import main

if __name__ == "__main__":
    sys.exit(main())
