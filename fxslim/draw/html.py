"""Write one HTML file that needs nothing else: the picture as data, our page, and the libraries that draw it."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from string import Template

from fxslim.draw.picture import Picture

LIBRARIES = ("d3.min.js", "dagre.min.js")
SCRIPTS = ("graph.js", "scene.js", "panels.js", "app.js")


def html(picture: Picture) -> str:
    """Return the page; it loads nothing from anywhere, and treats every name in the picture as text."""
    page = Template(_file("app", "page.html"))
    libraries = [f"/*\n{_file('vendor', _licence(name))}*/\n{_file('vendor', name)}" for name in LIBRARIES]
    scripts = [*libraries, *(_file("app", name) for name in SCRIPTS)]
    return page.substitute(
        title=escape(picture.title),
        style=_file("app", "app.css"),
        picture=data(picture),
        scripts="\n".join(f"<script>\n{script}\n</script>" for script in scripts),
    )


def data(picture: Picture) -> str:
    """Return a picture as JSON that can stand inside a script element, whatever names it holds."""
    text = json.dumps(picture.to_dict(), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _licence(library: str) -> str:
    return f"{library.partition('.')[0]}.LICENSE"


def _file(*parts: str) -> str:
    return files("fxslim.draw").joinpath(*parts).read_text(encoding="utf-8")
