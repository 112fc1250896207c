"""Convert models from and to other libraries' folders. Nothing here needs PyTorch."""
