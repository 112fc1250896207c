"""Measure which groups of people a model speaks of differently, and whom it prefers.

read.py, lexicon.py, pairs_file.py: the inputs; words.py: the words of a text; statistics.py:
figures and intervals; sampled.py, ranked.py, identifiers.py: associations; pairs.py, pronouns.py:
sentences that differ in one respect; run.py: all of it for a run; report.py, tables.py: for
readers.
"""
