"""Run the command line as ``python -m fxslim.cli``."""

from __future__ import annotations

from fxslim.cli import main

main()
