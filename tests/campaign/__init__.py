"""A standing campaign: damaged inputs (``fuzz``) and processes that are killed (``kill``)."""
