"""The parts of the command that writes certificates."""
