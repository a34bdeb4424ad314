"""`python -m tests.fuzz --records 1000000 --seed 1`: mutated records through every decoder, and what became of them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing import main

main()
