"""Feed-forward channels of a question answering model: prune the columns of every second linear, then take them out.

``python -m benchmarks.recipes.qa_ffn --data PATH --ffn2_sparsity 0.8``. ``--op_names`` says which linears.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from benchmarks.recipes.common import Questions, Steps, qa_options, schedule
from fxslim.inc import WeightPruningConfig, model_slim, prepare_compression


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; return figures before and after."""
    parser = qa_options("qa_ffn", __doc__, ffn2_sparsity=0.8)
    parser.add_argument("--op_names", nargs="+", default=[r"layer\.\d+\.output\.dense"])
    given = parser.parse_args(argv)
    task = Questions(given)
    dense = task.dense()
    model = copy.deepcopy(dense)
    trainer = task.trainer(model, teacher=dense)
    configs = WeightPruningConfig(
        [{"op_names": given.op_names, "pattern": "channelx1", "pruning_type": "snip_momentum"}],
        target_sparsity=given.ffn2_sparsity,
        pruning_scope="local",
        **schedule(task.steps(trainer)),
    )
    compression_manager = prepare_compression(model, configs)
    trainer.add_callback(Steps(compression_manager.callbacks))
    trainer.train()
    small = model_slim(model, round_multiplier=32)
    return task.report("qa_ffn", dense, small)


if __name__ == "__main__":
    main()
