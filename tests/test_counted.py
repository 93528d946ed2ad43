"""Models that count special tokens are verified in other sizes all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxslim

from agreement import difference, outputs, random_plan

EXACT = 1e-12
IMAGE, WIDTH = 9, 4


class Captions(nn.Module):
    """Puts features of images in the place of image tokens: as many of these as the images have features."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = shared
        self.embed, self.see = nn.Embedding(10, WIDTH), nn.Linear(3, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, ids: Tensor, images: Tensor) -> Tensor:
        x, at = self.embed(ids), (ids == IMAGE)[..., None].expand(-1, -1, WIDTH)
        features = self.see(images)
        rows = len(images) if self.shared else 2
        torch._check(x[at].numel() == rows * 2 * WIDTH, lambda: "other image tokens than features")
        x = x.masked_scatter(at, features)
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("shared", [True, False], ids=["any number of images", "two images"])
def test_longer_inputs_repeat_what_is_not_counted(shared: bool) -> None:
    model = Captions(shared=shared).double().eval()
    ids = torch.tensor([[IMAGE, IMAGE, 1, 2, 3, 4, 0], [5, IMAGE, 6, IMAGE, 7, 8, 0]])
    inputs = {"ids": ids, "images": torch.randn(2, 2, 3, dtype=torch.float64)}
    found = fxslim.inspect(model, inputs)
    plan = random_plan(model, found.sites)
    graph = fxslim.compile(found, plan=plan)
    assert not [note for note in graph.fxslim.report.notes if "axis 1 is fixed" in note.reason]
    longer = {**inputs, "ids": torch.cat([ids, ids[:, 2:4] % 9], 1)[:, torch.tensor([0, 1, 2, 3, 4, 7, 5, 6])]}
    longer["ids"][1, 5] = 1
    assert int((longer["ids"] == IMAGE).sum()) == 4
    with fxslim.masked(model, plan):
        expected = outputs(model, longer)
    assert difference(expected, outputs(graph, longer)) <= EXACT
