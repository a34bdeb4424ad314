"""Lets the tests of this folder share `promql.py`, and the workers of tests/broker."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "broker"))
