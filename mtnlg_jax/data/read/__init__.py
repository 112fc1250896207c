"""Readers: files of every kind in, documents out."""
