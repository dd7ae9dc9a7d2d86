"""The benchmark for a GPU runs to its end, with a tiny shape on the CPU."""

from __future__ import annotations

import json

import pytest

from gpu import TINY, main
from make_checkpoint import SHAPES


@pytest.mark.usefixtures("models_start_quickly")
def test_all_stages_run(tmp_path, capsys, monkeypatch):
    tiny = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "vocab_size": 258}
    monkeypatch.setitem(SHAPES, TINY.shape, SHAPES[TINY.shape] | tiny)
    out = tmp_path / "gpu.json"
    main(["--tiny", "--directory", str(tmp_path), "--out", str(out)])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json"}
    stages = found["stages"]
    assert list(stages) == [
        *("checkpoint", "calibrate", "ridge 20%", "ridge 50%", "local 50%"),
        "speed",
    ]
    assert all(stage["seconds"] > 0 for stage in stages.values())
    assert set(stages["local 50%"]["result"]["passes"]) == {
        *("coarse pass", "ridge", "sequential", "local")
    }
    dense, pruned = stages["speed"]["result"]["models"]
    assert pruned["model"] == "50"
    assert pruned["parameters"] < dense["parameters"]
    assert pruned["workloads"][0]["decode"]["ideal_ratio"] > 1


def test_what_does_not_begin_in_time_is_left_out(tmp_path, capsys):
    main(["--tiny", "--directory", str(tmp_path), "--limit", "-1"])
    assert set(json.loads(capsys.readouterr().out)["stages"].values()) == {None}
