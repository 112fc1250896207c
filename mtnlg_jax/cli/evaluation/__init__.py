"""The parts of launch/evaluate.py."""
