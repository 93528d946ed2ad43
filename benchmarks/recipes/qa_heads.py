"""Heads of a question answering model: prune them while it trains, then take them out.

``python -m benchmarks.recipes.qa_heads --data PATH --mha_sparsity 0.5``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from benchmarks.recipes.common import Questions, Steps, qa_options, schedule
from fxslim.inc import WeightPruningConfig, model_slim, prepare_compression


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; return figures before and after."""
    given = qa_options("qa_heads", __doc__, mha_sparsity=0.5).parse_args(argv)
    task = Questions(given)
    dense = task.dense()
    model = copy.deepcopy(dense)
    trainer = task.trainer(model, teacher=dense)
    configs = WeightPruningConfig(
        [{"pattern": "mha", "pruning_type": "snip_momentum"}],
        target_sparsity=given.mha_sparsity,
        pruning_scope="local",
        **schedule(task.steps(trainer)),
    )
    compression_manager = prepare_compression(model, configs)
    trainer.add_callback(Steps(compression_manager.callbacks))
    trainer.train()
    small = model_slim(model)
    return task.report("qa_heads", dense, small)


if __name__ == "__main__":
    main()
