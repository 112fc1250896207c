"""What a trained model remembers of its training text."""
