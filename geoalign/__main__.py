"""``python -m geoalign``: what torchrun starts."""

import sys

from geoalign.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
