"""Attention for NVIDIA GPUs: Pallas (Mosaic GPU), and cuDNN's."""
