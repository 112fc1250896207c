"""Looking inside a model: launch/inspect.py."""
