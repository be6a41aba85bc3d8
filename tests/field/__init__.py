"""Real engines, healthy and broken, run, traced and judged: ``python -m tests.field``."""
