"""Why a training step was unusual: launch/why.py."""
