"""Lets the tests find the package without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))
