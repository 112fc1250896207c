"""The parts of launch/bias.py."""
