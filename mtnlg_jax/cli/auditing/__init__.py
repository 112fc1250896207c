"""The parts of launch/audit.py."""
