"""The parts of launch/serve.py."""
