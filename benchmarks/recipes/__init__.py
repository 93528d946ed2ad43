"""Flows of Intel Neural Compressor's documents, on `fxslim.inc`: see `benchmarks.recipes.__main__`."""
