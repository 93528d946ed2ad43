"""What can be calibration data, and what is read of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from fxslim.batches import read
from fxslim.calibration import calibration
from fxslim.errors import InputError
from fxslim.passes.fitting.sequences import Rows, fingerprints

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}


def bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=99, **SIZES)).eval()


def t5() -> T5ForConditionalGeneration:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=99, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def whisper() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=99, num_mel_bins=8, max_source_positions=20,
        max_target_positions=30, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def ids(rows: int = 8, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for seed in range(5000):
            yield ids(1, seed=seed)[0]
        raise AssertionError("read to the end of what has none")


def test_a_loader_without_an_end_is_read_as_far_as_it_is_used() -> None:
    found = calibration(bert(), DataLoader(Endless(), batch_size=8), max_tokens=100)
    assert found.tokens == 96


def test_a_batch_with_more_tokens_than_asked_is_cut() -> None:
    batch = {"input_ids": ids(), "labels": torch.arange(8)}
    (found,) = calibration(bert(), [batch], max_tokens=20).batches
    assert found.tokens == 18
    assert torch.equal(found.inputs["input_ids"], batch["input_ids"][:3])
    assert torch.equal(found.labels["labels"], torch.arange(3))
    assert calibration(bert(), [batch], max_tokens=1).tokens == 6  # one row is the least


def test_rows_alone_are_traced_as_two() -> None:
    found = calibration(bert(), [ids(1, seed=seed) for seed in range(3)])
    assert found.example["input_ids"].shape == (2, 6)
    assert [batch.inputs["input_ids"].shape for batch in found.batches] == [(1, 6)] * 3


def test_inputs_within_lists_are_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, both: list[Tensor]) -> Tensor:
            return self.layer(both[0]) + both[1]

    found = calibration(Two(), [{"both": [torch.ones(8, 4), torch.ones(8, 4)]}])
    assert found.tokens == 8
    assert len(set(fingerprints(found.batches[0]))) == 1  # rows of ones
    (other,) = calibration(Two(), [{"both": [torch.arange(32.0).reshape(8, 4), torch.ones(8, 4)]}]).batches
    assert len(set(fingerprints(other))) == 8
    with pytest.raises(InputError, match="both holds NaN"):
        calibration(Two(), [{"both": [torch.ones(8, 4), torch.full((8, 4), torch.nan)]}])


def test_data_that_is_read_in_inference_mode_can_be_differentiated() -> None:
    with torch.inference_mode():
        (found,) = calibration(bert(), [ids()]).batches
    assert not found.inputs["input_ids"].is_inference()


class Dataset:
    """What a dataset of ``datasets`` offers; one that is streamed has no length."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, row, strict=True))


def test_columns_that_the_model_does_not_take_are_left_out() -> None:
    rows = [ids(1, 3 + i % 3, seed=i)[0].tolist() for i in range(40)]
    found = calibration(bert(), Dataset(input_ids=rows, idx=list(range(40)), sentence=["text"] * 40, label=[1] * 40))
    assert [set(batch.inputs) for batch in found.batches] == [{"input_ids", "attention_mask"}] * 2
    assert [len(batch.labels["label"]) for batch in found.batches] == [32, 8]
    assert found.tokens == sum(map(len, rows))


def test_a_decoder_reads_a_datasets_labels() -> None:
    labels = [[7, 8, 9], [7, 8]]
    (found,) = calibration(t5(), Dataset(input_ids=[[5, 6], [5, 6]], labels=labels)).batches
    assert found.inputs["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 7, 8]]
    assert found.inputs["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (TensorDataset(ids()), "not the rows of a TensorDataset; give a DataLoader"),
        ([{"input_ids": [5, 6, 7]}], "batch 0: input_ids is a list of numbers: give tensors"),
        ([{"input_ids": [5, 6, 7], "labels": 1}], "list of numbers"),
        (Dataset(text=["words"]), "no column of numbers for the model"),
    ],
)
def test_what_is_no_batch_is_named(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        calibration(bert(), given)


def test_one_of_several_datasets_is_asked_for() -> None:
    class Splits(dict[str, Any]):
        column_names = property(lambda self: {"train": ["input_ids"], "test": ["input_ids"]})

    with pytest.raises(InputError, match=r"several datasets, \['train', 'test'\]; give one"):
        calibration(bert(), Splits())


@pytest.mark.parametrize("model", [t5(), whisper()])
def test_decoder_inputs_are_those_of_the_loss(model: Any) -> None:
    labels = ids(3, 5)
    labels[1, 3:] = -100
    main = (
        {"input_features": torch.randn(3, 8, 40)}
        if model.main_input_name == "input_features"
        else {"input_ids": ids(3)}
    )
    found = read(model, {**main, "labels": labels})
    assert found.inputs["decoder_attention_mask"].tolist() == (labels != -100).long().tolist()
    with torch.no_grad():
        logits = model(**found.inputs).logits
        wanted = model(**main, labels=labels)
    counts = labels != -100
    torch.testing.assert_close(logits[counts], wanted.logits[counts])
    own = nn.functional.cross_entropy(logits[counts], labels[counts])
    torch.testing.assert_close(own, wanted.loss)


# Copies --------------------------------------------------------------------------------------------------------------


def rows_of_batches(*batches: dict[str, Tensor]) -> Rows:
    return Rows(calibration(bert(), batches).batches, frozenset())


def test_copies_are_on_one_side_and_count_once() -> None:
    first, other = ids(12, seed=1), ids(12, seed=2)
    mask = torch.ones(12, 8, dtype=torch.long)
    mask[:, 6:] = 0
    padded = torch.cat([first, torch.zeros(12, 2, dtype=torch.long)], 1)  # copies all the same
    whole = torch.ones(12, 6, dtype=torch.long)
    rows = rows_of_batches(
        {"input_ids": first, "attention_mask": whole},
        {"input_ids": padded, "attention_mask": mask},
        {"input_ids": other, "attention_mask": whole},
    )
    assert rows.copies == (12, 36)
    sides = [rows.judges(batch) for batch in range(3)]
    assert torch.equal(sides[0], sides[1])  # type: ignore[arg-type]
    assert sides[0] is not None and sides[0].nonzero()[:, 0].tolist() == [4, 9]
    assert sides[2] is not None and sides[2].nonzero()[:, 0].tolist() == [2, 7]  # the 15th and the 20th of all
    copied = [rows.copied(batch, 24, torch.device("cpu")) for batch in range(3)]
    assert [bool(own.all()) for own in copied] == [False, True, False]
    assert not copied[0].any() and not copied[2].any()


def test_where_there_are_few_sequences_parts_of_copies_are_on_one_side() -> None:
    node: Any = None
    rows = rows_of_batches({"input_ids": ids(2)}, {"input_ids": ids(2)})
    assert rows.judges(0) is None
    first, second = (rows.of(node, batch, 12, torch.device("cpu"))[1] for batch in range(2))
    assert torch.equal(first, second)
    assert first.nonzero()[:, 0].tolist() == [4, 9]
