"""``python -m geoalign``: what torchrun starts."""

import sys

from geoalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
