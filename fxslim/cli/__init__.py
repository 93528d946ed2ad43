"""The command line: ``fxslim inspect | plan | compile | slim-checkpoint | verify | export | bench | demo``.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 fxslim refused or failed, 2 wrong usage, 130
interrupted. Every command is a file; what it needs is imported when it runs, so that help and completion are quick.
"""

from __future__ import annotations

from fxslim.cli import bench, checkpoint, compile, demo, export, inspect, plan, verify
from fxslim.cli.app import app, main

__all__ = ["app", "bench", "checkpoint", "compile", "demo", "export", "inspect", "main", "plan", "verify"]
