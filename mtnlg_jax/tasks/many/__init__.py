"""Answer the rows of a file or of a folder of texts, and keep the answers in a file."""
