"""The MT-NLG data recipe: documents in, cleaned token arrays and a report out, in stages over
files."""
