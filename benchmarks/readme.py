"""Put what was measured between the README's markers."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def written(readme: str, inner: str, begin: str, end: str) -> str:
    """Put a text between two of the README's markers."""
    if begin not in readme or end not in readme:
        raise SystemExit(f"README.md lacks {begin} and {end}")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{inner}\n{end}", readme, flags=re.DOTALL)
