"""The test suite. A package, so that pytest puts the repository root on the path."""
