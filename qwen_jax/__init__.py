"""Qwen2 in JAX as pure functions that return every named sub-stage."""
