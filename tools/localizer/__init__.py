"""What ``tools.localize`` is made of: cases, known mistakes, shapes of errors, findings."""
