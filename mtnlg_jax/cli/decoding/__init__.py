"""What launch/generate.py and launch/task.py share: flags of the model, --set, and output."""
