"""Make a compiled graph faster for inference, and compare it with the graph that it was made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.errors import FxslimError, InputError, UnsupportedModelError, VerifyError
from fxslim.passes.emit import CompiledModule
from fxslim.passes.inference.draft import Draft, drafted
from fxslim.passes.inference.fold import FoldConstants
from fxslim.passes.inference.fuse import FuseLinears
from fxslim.passes.inference.masks import AddMasks
from fxslim.passes.inference.neutral import DropNeutral
from fxslim.passes.inference.once import ComputeOnce
from fxslim.passes.inference.optimized import OptimizedModule, PackedModule, emitted, through_inductor
from fxslim.passes.inference.prepack import SMALL, Prepack
from fxslim.passes.paths import Path
from fxslim.passes.regional import is_regional
from fxslim.passes.vary import further, varied
from fxslim.passes.verify import compare, refer
from fxslim.pipeline import Observer, Pass, Pipeline
from fxslim.program import Program

OPTIMIZE: tuple[Pass, ...] = (FoldConstants(), DropNeutral(), ComputeOnce(), AddMasks(), FuseLinears())


def optimize(
    graph: nn.Module, *, prepack: bool = False, inductor: bool = False, observer: Observer | None = None
) -> OptimizedModule:
    """Return a faster graph that computes the same, for inference in one dtype on one device.

    What is computed of parameters alone is computed once, dropout and copies go, equal operations run once, masks are
    made numbers once for all layers, and linears of the same value (queries, keys and values; gate and up) become one.
    Cast and move before, not after: the result refuses both. It shares the tensors that it does not change with the
    given graph, and takes no gradients for them. Weights that change in the given graph afterwards reach only a part of
    it: optimize again after weights change.

    Args:
        graph: what `compile` returned. It is not changed.
        prepack: lay weights of more than 2^18 numbers out in memory as oneDNN multiplies them on this CPU. It pays at 4
            to 64 rows (batch x length); a single row takes longer. The result is for this process: it can be copied,
            and neither exported nor saved; it has no gradients, of inputs neither, and refuses autocast. Weights that
            the graph reads twice (a head that is tied to embeddings) stay. The given graph keeps its own weights: drop
            it where memory counts.
        inductor: let ``torch.compile`` generate code for what is left, with sizes open; that takes its time at the
            first calls, and a C++ compiler on a CPU.
        observer: called after every pass.

    Raises:
        InputError: this is no compiled graph, or the options do not go together.
        UnsupportedModelError: the graph consists of several, or is on ``meta``; or what was made of it computes
            something else; or there is nothing to prepack.
    """
    if prepack and torch.is_autocast_enabled("cpu"):
        raise InputError("prepack=True does not go together with autocast: cast the graph before, and optimize that.")
    if prepack and inductor:
        raise InputError("prepack=True and inductor=True do not go together: inductor makes products of its own.")
    if is_regional(graph):
        raise UnsupportedModelError(
            f"{type(graph).__name__} was traced in regions: it is a module with several graphs inside, and optimize "
            "takes one graph. Use it as it is."
        )
    if not isinstance(graph, CompiledModule):
        raise InputError(
            f"optimize takes what fxslim.compile returns, not {type(graph).__name__}; compile(model) without a request "
            "takes out only what does nothing."
        )
    if isinstance(graph, OptimizedModule):
        raise InputError("this graph is optimized already; give the graph that it was made of.")
    if any(parameter.is_meta for parameter in graph.parameters()):
        raise UnsupportedModelError("the graph is on meta: constants cannot be computed without weights.")
    ways = _ways(graph)
    leaves = tuple(tuple(graph._caller.bind(way.inputs, {})) for way in ways)
    pipeline = Pipeline((*OPTIMIZE, Prepack()) if prepack else OPTIMIZE, given=(Draft,))
    facts = pipeline.run(drafted(graph, leaves), observers=() if observer is None else (observer,))
    made = emitted(facts.get(Draft), graph)
    if prepack and not isinstance(made, PackedModule):
        raise UnsupportedModelError(
            f"there is nothing to prepack: no product on a CPU whose weight has more than {SMALL} numbers, is read "
            "once, and is in a dtype that oneDNN multiplies there. Optimize without prepack=True."
        )
    made = through_inductor(made) if inductor else made
    _compare(graph, made, ways)
    return made


def _ways(graph: CompiledModule) -> tuple[Path, ...]:
    """Return inputs that the graph takes: those of the trace, and others in other sizes where it leaves them open."""
    inputs = tuple(node.name for node in graph.graph.find_nodes(op="placeholder"))
    call, ranges = graph._caller.call, graph._caller.ranges
    program = Program(graph.graph, {}, {}, {}, inputs, call, ranges=ranges)
    first = Path("as traced", _placed(call.example, graph))
    try:
        first.run(graph)
    except Exception as error:
        raise UnsupportedModelError(
            f"the graph does not run on the inputs that it was traced with ({type(error).__name__}: {error}), so that "
            "nothing could be compared. Use the graph as it is."
        ) from error
    for vary in varied(program):
        ways = [
            Path(
                vary.name if batch == vary.one else "other inputs",
                _placed(further(program, replace(vary, batch=batch)), graph),
            )
            for batch in dict.fromkeys((vary.batch, vary.one or vary.batch))
        ]
        try:
            for way in ways:
                way.run(graph)
        except Exception:  # noqa: BLE001 - a graph may refuse other inputs for reasons of its own
            continue
        return (first, *ways)
    return (first,)


def _placed(inputs: Any, graph: CompiledModule) -> Any:
    """Return inputs of the trace where the graph's tensors are now, and in their dtype.

    A graph of several dtypes cannot have been cast: its inputs are those of the trace.
    """
    own = [p for p in graph.parameters() if p.is_floating_point()]
    if not own:
        return inputs
    dtype = own[0].dtype if len({p.dtype for p in own}) == 1 else None

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(own[0].device, dtype if leaf.is_floating_point() else None)

    return pytree.tree_map(placed, dict(inputs))


def _compare(graph: CompiledModule, made: OptimizedModule, ways: tuple[Path, ...]) -> None:
    """Raise an error unless both graphs compute the same along every path."""
    plan = graph.fxslim.plan.spent()
    try:
        compare(graph, made, plan, refer(graph, plan, ways))
    except VerifyError as error:
        raise UnsupportedModelError(
            f"the optimized graph does not compute what the given one does ({error.where}: largest difference "
            f"{error.max_abs:.3g}, allowed {error.tolerance:.3g}). Use the graph as it is, and please report it."
        ) from error
    except FxslimError as error:
        raise UnsupportedModelError(f"the optimized graph cannot be verified: {error}") from error
