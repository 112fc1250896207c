"""Compiles the project's own steps for accelerators that are only described."""
