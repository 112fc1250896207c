"""Flags of compiled programs."""
