"""What ``tools.parity`` is made of: the grid, the programs it runs and how they are measured."""
