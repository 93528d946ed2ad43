"""Broken and malicious files: refused quickly, by an error of ours, and nothing is made of what they say."""

from __future__ import annotations

import copy
import json
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fxslim.checkpoint.files import INDEX, WEIGHTS, read_shard, read_shards
from fxslim.errors import FxslimError, InputError, PlanError, UnsupportedModelError
from fxslim.express import check_fields, set_fields
from fxslim.passes.narrow import replay
from fxslim.plan import MAX_JSON, Fingerprint, Plan
from fxslim.site import Fold, Site, SitePlan, Slice, blocks_of

EACH = 50
"""Inputs that are made of one drawn number."""
SLOW = 20.0
"""Seconds that no input may take."""
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 1 << 22, 1 << 24, 1 << 31, 1 << 40, 1 << 63, 1 << 64, -(1 << 63), 10**300),
    *(0.5, 1e308, float("nan"), float("inf")),
    *("", "../../etc/passwd", "..", "/", "\x00", "\ud800", "__class__", "a" * 2000),
    *([], {}, [[]], [0] * 1000, list(range(1000)), {"a": 1}, [None], "weight", "fc1.weight", "5"),
)  # fmt: skip


class Sizes:
    """A config, as one of transformers: its fields are attributes."""

    def __init__(self, intermediate_size: int) -> None:
        self.intermediate_size = intermediate_size
        self.model_type = "mlp"


class Mlp(nn.Module):
    """A block with an integer that says a width."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.width = nn.Linear(6, 8), nn.Linear(8, 6), 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        return self.fc2(torch.sigmoid(self.fc1(x).reshape(-1, self.width)))


def whole_plan() -> dict[str, Any]:
    """Return a valid plan with everything in it, as plain data."""
    own = blocks_of(np.arange(8))
    site = Site(
        name="mlp:ffn", kind="ffn", module="", units=8, roles={"up": ("fc1.weight",), "down": ("fc2.weight",)},
        slices=(Slice(tensor="fc1.weight", dim=0, size=8, role="out", blocks=own),
                Slice(tensor="fc1.bias", dim=0, size=8, role="out", blocks=own),
                Slice(tensor="fc2.weight", dim=1, size=8, role="in", blocks=own, hook="fc2")),
    )  # fmt: skip
    fold = Fold(tensor="fc2.weight", dim=1, bias="fc2.bias", rows=(1, 3), values=(0.5, 0.25))
    part = SitePlan(site=site, keep=(0, 2, 4, 5, 6, 7), folds=(fold,))
    plan = Plan(fxslim="0", torch="0", fingerprint=Fingerprint(model_class="Mlp", digest="0"), sites=(part,))
    data = json.loads(plan.to_json())
    heads = {"axis": 1, "size": 8, "keep": [0, 1], "rank": 3}
    data["edits"] = [
        {"edit": "attribute", "module": "", "name": "width", "old": 8, "new": 6},
        {"edit": "spread", "module": "fc1", "name": "output", "size": 8, "keep": [0, 2, 4, 5, 6, 7]},
        {"edit": "gather", "module": "", "name": "x", **heads},
        {"edit": "config", "module": "", "name": "intermediate_size", "old": 8, "new": 6},
    ]
    data["config"] = {"intermediate_size": [8, 6]}
    data["notes"] = [{"where": "here", "reason": "so"}]
    return dict(data)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return every place in nested data, as (holder, key)."""
    found: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found.extend((one, key) for key in keys)
        waiting.extend(one[key] for key in keys)
    return found


def mutated(data: Any, draw: random.Random) -> Any:
    """Return a copy of nested data with a few things changed."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        every = places(data)
        if not every:
            break
        holder, key = draw.choice(every)
        change = draw.randrange(6)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(draw.choice(holder)))
        elif change == 2 and isinstance(holder, dict):
            holder[draw.choice(("colour", "__class__", "edit", "name", "dtype"))] = copy.deepcopy(draw.choice(HOSTILE))
        elif change == 3 and type(holder[key]) is int:
            holder[key] += draw.choice((-2, -1, 1, 2, 1 << 20, 1 << 23, 1 << 39))
        elif change == 4:
            other, place = draw.choice(every)
            holder[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
        else:
            holder[key] = copy.deepcopy(draw.choice(HOSTILE))
    return data


def garbled(raw: bytes, draw: random.Random) -> bytes:
    """Return bytes with a few of them changed, taken out or put in."""
    made = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(made) + 1)
        change = draw.randrange(4)
        if change == 0 and at < len(made):
            made[at] = draw.randrange(256)
        elif change == 1:
            del made[at : at + draw.randrange(1, 40)]
        elif change == 2:
            made[at:at] = draw.randbytes(draw.randrange(1, 20))
        else:
            made = made[:at]
    return bytes(made)


COUNTED = {"plan": 0, "header": 0}
FUZZ = settings(max_examples=210, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def valid() -> dict[str, Any]:
    return whole_plan()


def loaded(model: nn.Module, plan: Plan) -> Any:
    """Return a copy of a dense skeleton with a plan replayed on it, as loading does with a narrowed model's config."""
    small: Any = copy.deepcopy(model)
    small.config = Sizes(6)
    check_fields(small.config, plan)
    set_fields(small.config, {path: old for path, (old, _) in plan.config.items()})
    replay(small, plan)
    return small


def test_the_plan_that_is_changed_is_a_good_one(valid: dict[str, Any]) -> None:
    small = loaded(Mlp(), Plan.from_json(valid))
    assert (small.width, small.config.intermediate_size, small.fc1.out_features) == (6, 6, 6)


@FUZZ
@given(seed=st.integers(0, 1 << 32))
def test_no_plan_crashes_or_hangs(valid: dict[str, Any], seed: int) -> None:
    draw = random.Random(seed)
    with torch.device("meta"):
        model = Mlp()
    for number in range(EACH):
        raw = json.dumps(mutated(valid, draw)) if number % 4 else garbled(json.dumps(valid).encode(), draw)
        begun = time.process_time()
        try:
            small = loaded(model, Plan.from_json(raw))
        except FxslimError:
            pass
        else:
            assert all(t.device.type == "meta" for t in small.parameters())
            assert small.config.intermediate_size <= 8, "it grows"
        assert time.process_time() - begun < SLOW
        COUNTED["plan"] += 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(6), "c": torch.zeros(0, 2), "d": torch.tensor(1.0)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder / WEIGHTS


@FUZZ
@given(seed=st.integers(0, 1 << 32))
def test_no_header_crashes_or_hangs(file: Path, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    draw = random.Random(seed)
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, rest = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    other = file.with_name("other.safetensors")
    for number in range(EACH):
        if number % 3:
            text = json.dumps(mutated(header, draw)).encode()
            size = draw.choice((len(text),) * 6 + (0, 1, len(text) + 8, 1 << 40, (1 << 64) - 1))
            other.write_bytes(struct.pack("<Q", size) + text + rest)
        else:
            other.write_bytes(garbled(raw, draw))
        begun = time.process_time()
        try:
            shard = read_shard(other)
        except InputError:
            pass
        else:
            for stored in shard.tensors:
                assert stored.start + stored.bytes <= other.stat().st_size
                assert stored.read().shape == stored.shape
        assert time.process_time() - begun < SLOW
        COUNTED["header"] += 1


def test_that_many_inputs_were_tried() -> None:
    if not all(COUNTED.values()):
        pytest.skip("the two tests before were not run in this process")
    assert sum(COUNTED.values()) >= 20_000


def test_a_plan_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "fxslim_plan.json"
    with path.open("wb") as opened:
        opened.truncate(1 << 30)  # a gigabyte that takes no room
    begun = time.process_time()
    with pytest.raises(PlanError, match=f"has {1 << 30} bytes; plans have at most {MAX_JSON}"):
        Plan.from_file(path)
    assert time.process_time() - begun < 1


def one(valid: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return a plan in which one thing is changed."""
    data = copy.deepcopy(valid)
    holder: Any = data
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = value
    return data


SLICE = ("sites", 0, "site", "slices", 0)
BOMBS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "rows": ((*SLICE, "size"), 1 << 25, "less than or equal to 16777216"),
    "experts": ((*SLICE, "experts"), 1 << 22, "would have 33554432 rows"),
    "width": ((*SLICE, "blocks", 0, "width"), 1 << 20, "two owners of a block would share rows"),
    "groups": (("sites", 0, "site", "groups"), [1 << 40] * 8, "at most as many groups as units"),
    "owners": ((*SLICE, "groups"), [1 << 40] * 8, "more owners than the site has units"),
    "edit": (("edits", 0, "new"), 1 << 63, "less than or equal to"),
    "a class": (("edits", 0, "name"), "__class__", "match pattern"),
    "a field": (("config",), {"__class__.x": [1, 1]}, "match pattern"),
    "a path": (("sites", 0, "folds", 0, "bias"), "../bias", "match pattern"),
    "no number": (("sites", 0, "folds", 0, "values"), [float("nan"), 1.0], "finite|no number"),
    "twice": (("sites", 0, "folds", 0, "rows"), [1, 1], "not about rows that go"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_before_anything_is_made_of_them(valid: dict[str, Any], case: str) -> None:
    place, value, message = BOMBS[case]
    begun = time.process_time()
    with pytest.raises(PlanError, match=message):
        Plan.from_json(one(valid, place, value))
    assert time.process_time() - begun < 1


def test_many_large_sites_are_refused_together(valid: dict[str, Any]) -> None:
    data = copy.deepcopy(valid)
    part = data["sites"][0]
    part["site"]["slices"][2]["size"] = 1 << 24
    data["sites"] = [{**part, "site": {**part["site"], "name": f"s{number}"}} for number in range(100)]
    begun = time.process_time()
    with pytest.raises(PlanError, match=r"its sites would have \d+ rows; 268435456 are the most"):
        Plan.from_json(json.dumps(data))
    assert time.process_time() - begun < 2


FAULTS = {
    "a sequence": ({"notes": [0] * 1_000_000}, "notes.0 Input should be a valid dictionary or instance of Note"),
    "nested": ({"sites": [{"site": {}, "keep": ["a"] * 1_000_000}]}, "sites.0.site.name Field required"),
    "strangers": ({f"a{i}": 0 for i in range(250_000)}, "Value error, an object has [0-9]+ fields; 1024 are the most"),
    "wishes": (
        {"requested": {f"a{i}": None for i in range(250_000)}},
        "requested Value error, an object has 250000 fields",
    ),
    "fields": ({"config": {f"a{i}": None for i in range(250_000)}}, "config Value error, an object has 250000 fields"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_of_many_faults_the_first_is_told_at_once(valid: dict[str, Any], case: str) -> None:
    wrong, message = FAULTS[case]
    text = json.dumps(valid | wrong)
    assert 3_000_000 < len(text) < MAX_JSON
    begun = time.process_time()
    with pytest.raises(PlanError, match=f"^not a valid fxslim plan: {message}") as caught:
        Plan.from_json(text)
    assert time.process_time() - begun < SLOW / 2
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("edits", 0, "name"), "training", "expects .training to be 8, found True"),
        (("edits", 0, "old"), 9, "expects .width to be 9, found 8"),
        (("edits", 1, "size"), 1 << 40, "more than it has"),
        (("edits", 1), {"edit": "config", "module": "fc1", "name": "width", "old": 8, "new": 6}, "8, found None"),
    ],
)
def test_edits_must_be_about_numbers_that_are_there(
    valid: dict[str, Any], place: tuple[Any, ...], value: Any, message: str
) -> None:
    data = one(valid, ("edits",), valid["edits"][:2])
    with pytest.raises(PlanError, match=message):
        replay(Mlp(), Plan.from_json(one(data, place, value)))


def headers(text: str, size: int | None = None) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw


MOST = (1 << 48) - 1
F4 = '"dtype":"F32","shape":[2]'
HEADERS = {
    "huge length": (headers("{}", 1 << 62), "header would be 4611686018427387904 bytes long"),
    "no length": (b"\x01\x02", "header would be -1 bytes long"),
    "deep": (headers("[" * 100_000), "header is no JSON"),
    "overlap": (headers(f'{{"a":{{{F4},"data_offsets":[0,8]}},"b":{{{F4},"data_offsets":[4,12]}}}}') + bytes(12),
                "does not fit its shape or place"),
    "hole": (headers(f'{{"a":{{{F4},"data_offsets":[4,12]}}}}') + bytes(12), "does not fit its shape or place"),
    "outside": (headers(f'{{"a":{{{F4},"data_offsets":[0,8]}}}}') + bytes(4), "was cut short"),
    "too long": (headers(f'{{"a":{{{F4},"data_offsets":[0,8]}}}}') + bytes(40), "was cut short or added to"),
    "dtype": (headers('{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}') + bytes(8), "dtype 'F33'"),
    "shape": (headers('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}') + bytes(8),
              "not lists of whole numbers"),
    "product": (headers(f'{{"a":{{"dtype":"F32","shape":[{MOST},{MOST}],"data_offsets":[0,8]}}}}') + bytes(8),
                "does not fit its shape"),
    "twice": (headers(f'{{"a":{{{F4},"data_offsets":[0,8]}},"a":{{{F4},"data_offsets":[0,8]}}}}') + bytes(8),
              "a name appears twice"),
    "metadata": (headers('{"__metadata__":{"a":1}}'), "metadata are not text"),
}  # fmt: skip


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_quantized_weights_are_called_quantized(code: str, tmp_path: Path) -> None:
    raw = headers(f'{{"a":{{"dtype":"{code}","shape":[8],"data_offsets":[0,8]}}}}') + bytes(8)
    (tmp_path / WEIGHTS).write_bytes(raw)
    with pytest.raises(
        UnsupportedModelError, match=rf"holds 'a' in {code}: its weights are quantized.*Narrow the model"
    ):
        read_shards(tmp_path)


@pytest.mark.parametrize("case", HEADERS)
def test_broken_headers_are_refused(case: str, tmp_path: Path) -> None:
    raw, message = HEADERS[case]
    (tmp_path / WEIGHTS).write_bytes(raw)
    with pytest.raises(InputError, match=message):
        read_shards(tmp_path)


def _indexes() -> Iterator[tuple[str, str, str]]:
    yield "climbs", '{"weight_map":{"a":"../../x.safetensors"}}', "is no safetensors file beside it"
    yield "no text", '{"weight_map":{"a":7}}', "is no safetensors file beside it"
    yield "no map", '{"weight_map":[1]}', "is no index of tensors"
    yield "no JSON", "[" * 100_000, "is no index of tensors"
    yield "missing", '{"weight_map":{"a":"gone.safetensors"}}', "lacks gone.safetensors"
    yield "disagrees", '{"weight_map":{"a":"model.safetensors"}}', "do not agree about"


@pytest.mark.parametrize(("text", "message"), [(text, message) for _, text, message in _indexes()],
                         ids=[name for name, _, _ in _indexes()])  # fmt: skip
def test_broken_indexes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2)}, tmp_path / WEIGHTS)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match=message):
        read_shards(tmp_path)
