"""An independent Qwen2 engine with faults planted by hand: what a localizer is put on trial with.

Nothing here imports the project's own forward pass or its catalogue of mistakes. ``engine`` is a
plain NumPy forward that dumps a foreign trace, ``faults`` replaces one of its operations with a
wrong one, ``checkpoints`` makes small models whose statistics are hard.
"""
