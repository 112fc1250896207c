"""Model cards: figures of a run, each from one of its files, as a page for people and machines."""
