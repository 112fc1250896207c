"""Make chain.py importable: the folder of the tests is not in the import path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
