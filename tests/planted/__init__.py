"""What the localizer is put on trial with: hard small models, and the planted faults in them.

The engine that has the faults, and the faults, are ``tools.numpy_engine``: a plain NumPy forward
that dumps a foreign trace. Neither it nor ``checkpoints`` imports the project's own forward pass or
its catalogue of mistakes.
"""
