"""Makes `kernel_cases` importable from the test folders below, and says what a bare GPU machine leaves out."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# A set-up of this project has these; a machine with torch, Triton and pytest alone may not.
NEEDS = {"test_frame_preprocess.py": "PIL", "test_philox.py": "scipy", "interpreted": "scipy", "dropin": "peft"}
collect_ignore = [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None]


def pytest_report_header() -> list[str]:
    """Name the files that are not collected: nothing is left out silently."""
    return [f"tests/kernels/{name} is left out: {NEEDS[name]} is not installed" for name in collect_ignore]
