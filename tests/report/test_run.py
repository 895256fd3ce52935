"""What a page tells of its run: settings, costs and the graph of its jobs."""

import json
import os
from pathlib import Path

import pytest

from orl import InputError
from orl.report import run

DOT = """digraph snakemake_dag {
    node[shape=box, style=rounded];
	0[label = "all", color = "0.00 0.6 0.85", style="rounded"];
	1[label = "report", color = "0.10 0.6 0.85", style="rounded"];
	2[label = "merge\\nmerged: embeddings\\nv: ", color = "0.2 0.6 0.85", style="rounded,dashed"];
	3[label = "embed\\nshard: 0001-of-0002\\nv: ", color = "0.3 0.6 0.85", style="rounded,dashed"];
	4[label = "embed\\nshard: 0002-of-0002\\nv: ", color = "0.3 0.6 0.85", style="rounded,dashed"];
	5[label = "neighbors\\nv: ", color = "0.4 0.6 0.85", style="rounded"];
	6[label = "merge\\nmerged: correspondences\\nv: ", color = "0.2 0.6 0.85", style="rounded,dashed"];
	7[label = "correspond", color = "0.2 0.6 0.85", style="rounded,dashed"];
	1 -> 0
	2 -> 5
	3 -> 2
	4 -> 2
	5 -> 7
	7 -> 6
	6 -> 1
	5 -> 1
}
"""


def benchmark(folder: Path, name: str, seconds: float, memory: str, at: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:00:01\t{memory}\t1.0\n")
    os.utime(path, (at, at))


def test_costs_are_by_rule(tmp_path: Path) -> None:
    for at, (name, seconds, memory) in enumerate([
        ("scenes.tsv", 5.0, "NA"), ("stage1-k2.seed1.tsv", 100.0, "1024"), ("stage1.tsv", 300.0, "2048"),
        ("embed-k2/0001-of-0002.tsv", 2.0, "10"), ("orl.tsv", 7.0, "1"),
        ("downstream/orl-k2.seed1/voc07_svm.tsv", 1, "1"), ("downstream/orl/objects.features.tsv", 1, "1"),
        ("downstream/orl/features.tsv", 1, "1"), ("downstream/orl/semi.objects/0.1-lr0.01-x10.tsv", 1, "1"),
        ("downstream/orl/semi.objects/0.1-run2.tsv", 1, "1"),
        ("downstream/orl/semi.objects.tsv", 1, "1"), ("downstream/subset-k2/objects/0.1.tsv", 1, "1"),
    ], 1):  # fmt: skip
        benchmark(tmp_path, name, seconds, memory, at)
    found = run.costs(tmp_path)
    assert [one.rule for one in found] == [
        "scenes", "stage1", "embed", "stage3", "voc07_svm", "set_features", "features", "semi_grid", "semi_run", "semi",
        "subset",
    ]  # fmt: skip
    assert found[0].cells() == ["1", "5 s", "5 s", "–"]
    assert found[1].cells() == ["2", "6.7 min", "5.0 min", "2.1 GB"]
    assert run.costs(tmp_path / "none") == []


def test_settings_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"name": "mine", "seed": 3, "neighbors": {"k": 10}, "variants": {"b": {"seed": 4}}}))
    assert run.settings(path) == [("seed", "3", "0"), ("variants.b.seed", "4", "–")]  # ten neighbours are the default
    path.write_text(json.dumps({"downstream": {"voc07_svm": {"costs": [0.5]}}}))
    assert run.settings(path) == [("downstream.voc07_svm.costs", "[0.5]", "[1.9073486328125e-06, …, 100.0], 19 in all")]
    path.write_text("{")
    with pytest.raises(InputError, match=r"config.json: is no config of a run"):
        run.settings(path)


def test_the_graph_has_each_rule_once_and_no_merges(tmp_path: Path) -> None:
    path = tmp_path / "jobs.dot"
    path.write_text(DOT)
    benchmark(tmp_path / "benchmarks", "embed/0001-of-0002.tsv", 60, "1", 1)
    graph = run.graph(path, run.costs(tmp_path / "benchmarks"))
    places = {rule: (x, y) for x, y, rule, _ in graph.boxes}
    assert set(places) == {"embed", "neighbors", "correspond", "report"}
    assert sorted(places, key=lambda rule: places[rule][0]) == ["embed", "neighbors", "correspond", "report"]
    assert len(graph.curves) == 3  # what follows from others is left out
    assert {rule: took for _, _, rule, took in graph.boxes if took} == {"embed": "1 job · 1.0 min"}
    assert "neighbors needs embed" in graph.alt
    assert all(0 <= x <= graph.width - run.BOX[0] and 0 <= y <= graph.height - run.BOX[1] for x, y, *_ in graph.boxes)
    next_round = '\t8[label = "stage3", ];\n\t9[label = "embed", ];\n\t6 -> 8\n\t8 -> 9\n\t9 -> 2\n}'
    path.write_text(DOT.replace("}", next_round))
    assert {rule for _, _, rule, _ in run.graph(path, []).boxes} == {*places, "stage3"}
    path.write_text("digraph {}")
    with pytest.raises(InputError, match=r"jobs.dot: is no graph"):
        run.graph(path, [])
    with pytest.raises(InputError, match=r"none.dot: cannot be read"):
        run.graph(tmp_path / "none.dot", [])
