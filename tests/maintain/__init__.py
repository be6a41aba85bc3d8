"""Scripts for maintainers: what is made once and committed. Not in the wheel."""
