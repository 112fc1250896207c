"""Parts of launch/task.py: its flags, their checks, its rows, and what it does with them."""
