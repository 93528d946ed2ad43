"""Measurements behind every claim about speed, size and quality; results are written to ``benchmarks/results``.

Each module is a script (``python -m benchmarks.<name>``) that prints what it measured and keeps it as JSON and
Markdown, together with the machine it was measured on.
"""
