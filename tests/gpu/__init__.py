"""Programs as XLA compiled them for a GPU, kept as its own files: what the tests of
``tools.parity.gpu`` read where the compiler is not installed. ``python -m tests.gpu`` makes them.
"""
