"""The parts of launch/inspect.py."""
