"""Plan from a checkpoint's weights alone, one tensor at a time."""

from __future__ import annotations

from os import PathLike

from typing_extensions import Unpack

from fxslim.asked import Fractions
from fxslim.plan import Plan


def plan_checkpoint(src: str | PathLike[str], *, progress: bool = False, **asked: Unpack[Fractions]) -> Plan:
    """Choose what to take out of a checkpoint by the magnitude of its weights, without loading it.

    The model is traced on ``meta``; then every tensor that decides anything is read once, measured, and forgotten. The
    plan is the one that `fxslim.plan` makes of the loaded model.

    Args:
        src: a local folder with a dense checkpoint of transformers in safetensors files.
        progress: show a progress bar.
        **asked: what to take out: see `fxslim.asked.Fractions`. Without any fraction, only what does nothing goes.

    Raises:
        InputError: there is no such folder, files are missing, cut short or broken, or a weight holds NaN.
        RequestError: a fraction is out of range, or a glob matches nothing.
        UnsupportedModelError: the checkpoint is quantized, or transformers does not know its class.
    """
    raise NotImplementedError
