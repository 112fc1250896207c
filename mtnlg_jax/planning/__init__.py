"""Predict steps: layouts ranked by arithmetic, and steps compiled for accelerators that are only
described."""
