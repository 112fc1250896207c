"""Parts of launch/prepare_data.py: its flags, and the recipe that they describe."""
