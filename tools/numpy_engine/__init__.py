"""A small Qwen engine in plain NumPy, and mistakes to plant in it: an example to point the tools
at, and what their tests find the mistakes of. It shares no code with the rest of the project."""
