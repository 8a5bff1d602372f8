"""``python -m geoalign_kernels.static``: see ``check``."""

import sys

from geoalign_kernels.static.check import main

sys.exit(main())
