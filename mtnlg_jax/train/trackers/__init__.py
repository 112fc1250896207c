"""Trackers of a run: TensorBoard, Weights & Biases, Trackio, or a class of the user's."""
