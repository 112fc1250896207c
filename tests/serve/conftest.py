"""Provide the tiny model and the tokenizer of the decoding tests."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[1] / "decode" / "conftest.py"
_spec = importlib.util.spec_from_file_location("decode_fixtures", _PATH)
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)

tokenizer = _fixtures.tokenizer
learned = _fixtures.learned
