"""Readers: turn files of every kind into documents."""
