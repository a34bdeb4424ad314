"""Lets the tests of this folder share `gate_world.py` and `api_process.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
