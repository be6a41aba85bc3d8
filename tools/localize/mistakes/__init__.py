"""The mistakes that engines make: edits of an operation, and the names of known ones."""
