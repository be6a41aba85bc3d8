"""The same stages from PyTorch and Hugging Face transformers."""
