"""Parts of launch/generate.py: its flags, their checks, and its modes."""
