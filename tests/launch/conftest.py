"""Put the folder of these tests into the import path, for killing.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
