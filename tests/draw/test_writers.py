"""Files that pictures are written into are read back by others."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fxslim
from fxslim.draw import dot, explorer
from fxslim.draw.html import LIBRARIES, html
from fxslim.errors import InputError

from pictures import HOSTILE, picture

pygraphviz = pytest.importorskip("pygraphviz", reason="SVG and this reader of dot need pygraphviz: fxslim[draw]")
NAMES = ("up", HOSTILE)


@pytest.mark.parametrize("name", NAMES)
def test_dot_is_read_back_by_graphviz(name: str) -> None:
    read = pygraphviz.AGraph(string=dot.dot(picture(name)))
    assert sorted(read.nodes()) == sorted(["input", "output", *(box.name for box in picture(name).sites)])
    assert len(read.edges()) == 5
    read = pygraphviz.AGraph(string=dot.dot(picture(name), site="layers.0.mlp:ffn"))
    assert sorted(read.nodes()) == ["0", "1", "2", "3", "4"]
    assert sorted(read.edges()) == [("0", "1"), ("1", "2"), ("2", "3"), ("3", "4")]
    assert read.get_edge("1", "2").attr["color"] == dot.COLOURS["ffn"]
    assert read.get_edge("0", "1").attr["color"] == read.get_edge("3", "4").attr["color"] == dot.STREAM


def test_filled_parts_are_kept_parts() -> None:
    text = dot.dot(picture())
    widths = [int(width) for width in re.findall(r'WIDTH="(\d+)"', text)]
    assert widths == [75, 75, 38, 112, 75, 75, 38, 112]  # half of the heads, a quarter of the channels, of 150


@pytest.mark.parametrize("name", NAMES)
def test_svg_is_xml_and_holds_no_script(name: str) -> None:
    for site in (None, "layers.0.mlp:ffn"):
        root = ElementTree.fromstring(dot.svg(picture(name), site=site))
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert "text" in tags and not tags & {"script", "img", "image", "foreignObject"}
        assert not any(key.startswith("on") for element in root.iter() for key in element.attrib)
    texts = [element.text or "" for element in ElementTree.fromstring(dot.svg(picture())).iter()]
    assert any("12 of 48 channels" in text for text in texts)


@pytest.mark.parametrize("name", NAMES)
def test_model_explorer_gets_nodes_edges_and_kept_ratios(name: str) -> None:
    drawn = picture(name)
    made = json.loads(json.dumps(explorer.collection(drawn)))
    data = json.loads(json.dumps(explorer.node_data(drawn)))
    assert made["label"] == drawn.title and [graph["id"] for graph in made["graphs"]] == ["sites", "operations"]
    for graph in made["graphs"]:
        ids = [node["id"] for node in graph["nodes"]]
        assert len(set(ids)) == len(ids)
        for node in graph["nodes"]:
            assert isinstance(node["label"], str) and isinstance(node["namespace"], str)
            assert all({"key", "value"} == set(pair) for pair in node.get("attrs", ()))
            for edge in node["incomingEdges"]:
                assert edge["sourceNodeId"] in ids
                assert {"sourceNodeOutputId", "targetNodeInputId"} <= set(edge)
        assert set(data[graph["id"]]["results"]) <= set(ids)
    assert {key: row["value"] for key, row in data["sites"]["results"].items()} == {
        "layers.0.attn:attention": 0.5, "layers.0.mlp:ffn": 0.25,
        "layers.1.attn:attention": 0.5, "layers.1.mlp:ffn": 0.25,
    }  # fmt: skip
    gelu = made["graphs"][1]["nodes"][2]
    assert (gelu["label"], gelu["namespace"]) == ("gelu", "layers/0/mlp")
    assert gelu["outputsMetadata"][0]["attrs"][0] == {"key": "shape", "value": "B×S×48"}
    assert [stop["stop"] for stop in data["sites"]["gradient"]] == [0.0, 0.5, 1.0]


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes, and the text of the picture's element."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][1].get("id") == "picture":
            self.data += data


@pytest.mark.parametrize("name", NAMES)
def test_html_is_one_file_that_loads_nothing(name: str) -> None:
    page = Tags()
    page.feed(html(picture(name)))
    assert json.loads(page.data) == json.loads(json.dumps(picture(name).to_dict()))
    assert not [tag for tag, attributes in page.tags if {"src", "href", "srcset", "data"} & set(attributes)]
    assert [tag for tag, _ in page.tags].count("script") == 1 + len(LIBRARIES) + 4
    assert "img" not in [tag for tag, _ in page.tags]
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_libraries_are_what_their_readme_says() -> None:
    vendor = files("fxslim.draw").joinpath("vendor")
    readme = vendor.joinpath("README.md").read_text(encoding="utf-8")
    for library in LIBRARIES:
        digest = hashlib.sha256(vendor.joinpath(library).read_bytes()).hexdigest()
        assert re.search(rf"`{re.escape(library)}` .*`{digest}`", readme), library
        licence = vendor.joinpath(f"{library.partition('.')[0]}.LICENSE").read_text(encoding="utf-8")
        assert licence in html(picture())


def test_the_suffix_says_how(tmp_path: Path) -> None:
    for suffix in (".html", ".svg", ".dot", ".json"):
        assert fxslim.draw(picture(), tmp_path / f"a{suffix}") == picture()
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["a.dot", "a.html", "a.json", "a.svg", "a_node_data.json"]
    assert (tmp_path / "a.dot").read_text(encoding="utf-8") == dot.dot(picture())
    with pytest.raises(InputError, match=r"into 'a.png': the name must end in one of .html, .svg, .dot, .json"):
        fxslim.draw(picture(), tmp_path / "a.png")


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(InputError, match=r"no operations of 'layers.1.mlp:ffn': a plan or a report by itself"):
        fxslim.draw(picture(), path, site="layers.1.mlp:ffn")
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("a.svg", "old")]
    for suffix in (".html", ".json"):
        with pytest.raises(InputError, match=r"site= is for .svg and .dot"):
            fxslim.draw(picture(), tmp_path / f"b{suffix}", site="layers.0.mlp:ffn")
    with pytest.raises(FileNotFoundError):
        fxslim.draw(picture(), tmp_path / "nowhere" / "a.dot")
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]
