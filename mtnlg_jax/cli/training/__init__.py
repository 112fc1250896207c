"""Parts of launch/pretrain.py."""
