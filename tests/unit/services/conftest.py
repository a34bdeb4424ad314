"""Lets the tests of this folder share `broker.oracle_world`, as those of tests/chaos do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
