"""Passes that make a compiled graph faster and change nothing that it computes."""
