"""Checkpoints on disk that are never loaded: planned from their weights, and narrowed tensor by tensor."""
