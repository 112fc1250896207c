"""Inputs longer than the context: every task by parts, no part left out."""
