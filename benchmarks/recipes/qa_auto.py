"""Channels and heads of a question answering model at once, found by themselves, with the dense model as a teacher.

``python -m benchmarks.recipes.qa_auto --data PATH --ffn2_sparsity 0.9 --mha_sparsity 0.6 --distill_loss_weight 4.5``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from benchmarks.recipes.common import Questions, Steps, qa_options, schedule
from fxslim.inc import WeightPruningConfig, model_slim, parse_auto_slim_config, prepare_compression


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; return figures before and after."""
    given = qa_options("qa_auto", __doc__, ffn2_sparsity=0.9, mha_sparsity=0.6).parse_args(argv)
    task = Questions(given)
    dense = task.dense()
    model = copy.deepcopy(dense)
    trainer = task.trainer(model, teacher=dense)
    auto_slim_configs = parse_auto_slim_config(
        model, ffn2_sparsity=given.ffn2_sparsity, mha_sparsity=given.mha_sparsity, pruning_scope="local"
    )
    configs = WeightPruningConfig(auto_slim_configs, **schedule(task.steps(trainer)))
    compression_manager = prepare_compression(model, configs)
    trainer.add_callback(Steps(compression_manager.callbacks))
    trainer.train()
    small = model_slim(model, round_multiplier=32)
    return task.report("qa_auto", dense, small)


if __name__ == "__main__":
    main()
