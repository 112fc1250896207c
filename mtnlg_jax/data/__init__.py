"""From raw text to batches: documents, tokenizer, token arrays, rows of a batch. Nothing here needs
JAX."""
