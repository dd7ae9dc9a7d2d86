"""What an earlier version had is refused with a sentence on what to do instead."""

from __future__ import annotations

import pytest

import cfsp
from cfsp.errors import GONE, GONE_TEXTS, UsageError

# A command that still asks for it.
ASKING = {
    "cache": "cache",
    "plan": "plan model --statistics s --sparsity 0.2 --out plan.json",
    "push": "push smaller owner/name",
    "self": "prune {model} --sparsity 0.2 --data self --out smaller",
    "png": "report smaller --png charts",
    "engine": "bench copy --engine vllm",
    "shape": "bench --shape llama-2-7b",
    "sglang": "export pruned --to sglang --out copy",
    "tensorrt-llm": "export pruned --to tensorrt-llm --out copy",
    "padded": "export pruned --to padded --out copy",
    "dora": "recover pruned --method dora --out recovered",
    "of": "prune {model} --sparsity 0.2 --of model --out smaller",
    "sequential": "prune {model} --sparsity 0.2 --repair sequential --out smaller",
    **{
        metric: f"prune {{model}} --sparsity 0.2 --set block_metric={metric} --out smaller"
        for metric in ("cosine", "euclidean", "mse", "mae", "angular+sensitivity")
    },
    **{
        metric: f"prune {{model}} --sparsity 0.2 --set channel_metric={metric} --out smaller"
        for metric in ("wanda", "magnitude", "random")
    },
    **{
        method: f"sweep {{model}} --sparsity 0.2 --method {method} --eval t --out sweep"
        for method in ("wanda-sp", "magnitude-sp", "blocks-alone")
    },
}


@pytest.mark.parametrize("word", [*GONE, *GONE_TEXTS])
def test_what_went_is_said(word, model, command):
    asked = ASKING.get(word, f"recover pruned --steps 1 --out recovered --{word} 1")
    error = command(*asked.format(model=model).split(), status=2).err
    assert (GONE | GONE_TEXTS)[word] in error


@pytest.mark.parametrize(
    ("word", "asked"),
    [
        ("of", {"of": "model"}),
        ("sequential", {"repair": "sequential"}),
        ("eval-seqlen", {"eval_seqlen": 64}),
        ("plan", {"plan": "cfsp_plan.json"}),
    ],
)
def test_so_is_what_python_had(word, asked, tmp_path):
    with pytest.raises(UsageError, match=GONE[word]):
        cfsp.prune("none", out=tmp_path / "out", sparsity=0.2, **asked)
