"""Rules that remove or change documents: boilerplate, personal data, repetition, duplicates, test
sets."""
