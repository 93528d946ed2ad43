"""The ways in which a model can be run: with and without a mask, eager and fused attention, with a cache.

One path is not enough: a module that was narrowed wrongly may pass on one of them and fail on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.overlay import underlying
from fxslim.passes.training import drawing, repeatable, training
from fxslim.program import forward_parameters
from fxslim.sharing import evaluating

NEW_TOKENS = 3
SETTINGS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states", "labels")
"""Inputs of ``forward`` that generation sets by itself, or has no use for."""


@dataclass(frozen=True)
class Path:
    """One way to run a model.

    Attributes:
        name: what to call it in reports.
        inputs: keyword inputs.
        attention: the attention implementation to switch to, or None for the model's own.
        generate: whether to run greedy decoding with a cache instead of one forward.
        fused: whether layers of torch's own may run as one kernel each. Their results at padding differ from those of
            the operations they stand for, which are what a graph holds.
        training: whether to run in training mode, with nothing dropped.
        own: whether nobody asked for it: a model that cannot be run this way is verified along the others.
    """

    name: str
    inputs: Mapping[str, Any]
    attention: str | None = None
    generate: bool = False
    fused: bool = False
    training: bool = False
    own: bool = False

    def run(self, model: nn.Module) -> list[torch.Tensor]:
        """Return the tensors that the model returns along this path.

        It gets inputs that it may write into, and draws the same numbers every time.
        """
        with self.mode(model), drawing(model):
            return self._call(model)

    def mode(self, model: nn.Module) -> AbstractContextManager[None]:
        """Put a model, or a part of one, into the mode of this path."""
        return training(model) if self.training else evaluating(model)

    def _call(self, model: nn.Module) -> list[torch.Tensor]:
        inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, dict(self.inputs))
        with torch.no_grad(), _attention(model, self.attention), _fused(self.fused):
            if self.generate:
                return _generate(model, inputs)
            with _without_caches(model):
                return tensors_of(model(**inputs))

    def fits(self, model: nn.Module) -> bool:
        """Tell whether a model can be compared along this path, if it is one in training mode."""
        return repeatable(model, self._call)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Return the tensors in a model's result."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def paths(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    filled: frozenset[str] = frozenset(),
    given: Mapping[str, Any] | None = None,
    train: bool = True,
) -> tuple[Path, ...]:
    """Return every path that a model offers for some inputs.

    Args:
        model: the dense model.
        inputs: keyword inputs.
        filled: names of inputs that may be left out.
        given: inputs of the user's, for layers of torch's own that are fused: made-up masks leave rows without keys.
        train: whether to run in training mode as well, where a model can be compared in it.
    """
    found = [Path("as given", inputs)]
    bare = {name: value for name, value in inputs.items() if name not in filled}
    if len(bare) < len(inputs):
        found.append(Path("without mask", bare))
    for other in _other_attention(model):
        found.append(Path(f"{other} attention", inputs, attention=other, own=True))
        if len(bare) < len(inputs):
            found.append(Path(f"{other} attention without mask", bare, attention=other, own=True))
    if generates(model) and "input_ids" in inputs:
        found.append(Path("generate with cache", inputs, generate=True, own=True))
    if given is not None and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        fused = Path("fused layers", given, fused=True)
        if all(bool(t.isfinite().all()) for t in fused.run(model)):  # rows without a key: NaN fused, zero otherwise
            found.append(fused)
    trained = Path("training", inputs, training=True)
    if train and trained.fits(model):
        found.append(trained)
    return tuple(found)


def generates(model: nn.Module) -> bool:
    """Tell whether a model has transformers' generation."""
    can = getattr(model, "can_generate", None)
    return bool(callable(can) and can() and callable(getattr(model, "generate", None)))


@contextmanager
def _fused(wanted: bool) -> Iterator[None]:
    """Turn the fused layers of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` off, unless they are wanted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and wanted)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _other_attention(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    current = getattr(config, "_attn_implementation", None)
    if current not in ("eager", "sdpa") or not callable(getattr(model, "set_attn_implementation", None)):
        return ()
    if current == "eager" and not getattr(model, "_supports_sdpa", False):
        return ()
    return ("sdpa",) if current == "eager" else ("eager",)


@contextmanager
def _attention(model: nn.Module, implementation: str | None) -> Iterator[None]:
    if implementation is None:
        yield
        return
    switch: Callable[[str], None] = model.set_attn_implementation  # type: ignore[assignment]
    configs = {id(c): c for m in model.modules() if (c := underlying(vars(m).get("config"))) is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    switch(implementation)
    try:
        yield
    finally:
        switch(before[0][1])
        for config, own in before:  # towers may differ; outer configs come first, and set their inner ones
            if config._attn_implementation != own:
                config._attn_implementation = own


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Turn key/value caches off: a cache is no result, and its shape follows the heads."""
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    on = [config for config in configs.values() if getattr(config, "use_cache", None)]
    try:
        for config in on:
            config.use_cache = False
        yield
    finally:
        for config in on:
            config.use_cache = True


def _generate(model: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the logits of a few greedy steps with a cache."""
    prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_") and name not in SETTINGS}
    names, _, _ = forward_parameters(model)
    if "attention_mask" in prompt and not getattr(model.config, "is_encoder_decoder", False):
        prompt["attention_mask"] = torch.ones_like(prompt["attention_mask"])  # decoders would want left padding
    result = model.generate(  # type: ignore[operator]
        **{name: value for name, value in prompt.items() if name in names},
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [step.float() if step.dtype in (torch.float16, torch.bfloat16) else step for step in result.logits]
