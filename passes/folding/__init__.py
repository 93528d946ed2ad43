"""Lossless folding: what is the same number for every input goes into a bias of its consumer."""
