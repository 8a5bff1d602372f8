"""Makes `kernel_cases` importable from the test folders below."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
