"""A certificate for a config: a small copy of it on simulated devices computes what one device
does."""
