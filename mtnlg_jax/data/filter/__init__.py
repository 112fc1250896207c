"""What the recipe removes or changes in documents: boilerplate, personal data, repetition,
duplicates, test sets."""
