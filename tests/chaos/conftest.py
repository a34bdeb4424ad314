"""Lets the tests of this folder share its modules and those of tests/broker."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
