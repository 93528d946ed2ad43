"""Label rules, one file per family of operations."""
