"""A picture that is made by hand: two layers with two sites each, and the operations of one of them."""

from __future__ import annotations

from itertools import pairwise

from fxslim.draw.picture import Box, Feed, Group, Op, Picture, Rows, Stay, Total

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'&\\"
"""A name that would run if any writer took it for anything but text."""


def picture(name: str = "up") -> Picture:
    """Return the picture.

    Args:
        name: what one of the modules, tensors, reasons and so on are called.
    """
    attention = [_attention(f"layers.{layer}") for layer in range(2)]
    ffn = [_ffn(f"layers.{layer}", name, ops=(1, 2, 3) if layer == 0 else ()) for layer in range(2)]
    sites = (attention[0], ffn[0], attention[1], ffn[1])
    chain = ["input", *(box.name for box in sites), "output"]
    return Picture(
        title=f"Made {name}",
        sites=sites,
        feeds=tuple(Feed(one, other, "stream 1") for one, other in pairwise(chain)),
        groups=(
            *(Group(box.name, "site", box.units) for box in sites),
            Group("stream 1", "stream", 16, f"tied by {name}"),
        ),
        modules=(("layers.0.mlp", name),),
        ops=_ops(ffn[0].name, name),
        stays=(Stay(f"embed.{name}", f"looked up: {name}"),),
        notes=(Stay("trace", name),),
        totals=(Total("parameters", 1000, 600),),
        narrowed=True,
    )


def _attention(layer: str) -> Box:
    module = f"{layer}.attn"
    return Box(f"{module}:attention", "attention", module, "heads", 4, 2, ((0, 1), (2, 1)), groups=2)


def _ffn(layer: str, name: str, ops: tuple[int, ...]) -> Box:
    module = f"{layer}.mlp"
    rows = (Rows(f"{module}.{name}.weight", 0, 48, 12, "out"), Rows(f"{module}.down.weight", 1, 48, 12, "in"))
    roles = (("up", (f"{module}.{name}.weight",)), ("down", (f"{module}.down.weight",)))
    return Box(
        f"{module}:ffn", "ffn", module, "channels", 48, 12, ((0, 12),), roles=roles, rows=rows, ops=ops, note=name
    )


def _ops(site: str, name: str) -> tuple[Op, ...]:
    inner, stream = (site,), ("stream 1",)
    return (
        Op("x", "input", "", (), "B×S×16", "float32", groups=stream),
        Op(f"linear_{name}", "aten.linear", f"layers.0.mlp.{name}", (0,), "B×S×48", "float32", "B×S×12", 0.25,
           (f"layers.0.mlp.{name}.weight",), ((site, "up"),), (name,), inner),
        Op("gelu", "aten.gelu", "layers.0.mlp", (1,), "B×S×48", "float32", "B×S×12", 0.25, (),
           ((site, "act"),), (), inner),
        Op("linear_1", "aten.linear", "layers.0.mlp.down", (2,), "B×S×16", "float32", "", 1.0,
           ("layers.0.mlp.down.weight",), ((site, "down"),), (), stream),
        Op("output", "output", "", (3,), "", "", pinned=("an output of the model",)),
    )  # fmt: skip
