"""What a trace is: the stages, the files, and the arithmetic of comparing. NumPy only."""
