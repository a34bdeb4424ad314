"""Lets the test use `mutations.py` and `fuzzing.py` of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
