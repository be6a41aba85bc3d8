"""A model's stages from PyTorch and Hugging Face transformers: the reference."""
