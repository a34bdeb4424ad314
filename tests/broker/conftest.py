"""Lets the tests of this folder share `proxy.py` and `worker_process.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
