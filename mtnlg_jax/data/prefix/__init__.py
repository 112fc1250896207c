"""What rows have ahead of their text: images, and features of encoders outside of the model."""
