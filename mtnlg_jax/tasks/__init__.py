"""Tasks: continue, summarise, translate, sentiment and answer, each from a text to a text and a
score."""
