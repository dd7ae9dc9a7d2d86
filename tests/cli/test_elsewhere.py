"""What other tools have and cfsp has not is refused with a sentence on what to do instead."""

import pytest

import cfsp
from cfsp.errors import ELSEWHERE, UsageError

# A command that asks for it; the rest are options.
ASKING = {
    "push": "push smaller owner/name",
    "sglang": "export pruned --to sglang --out copy",
    "tensorrt-llm": "export pruned --to tensorrt-llm --out copy",
    "dora": "recover pruned --method dora --out recovered",
    **{
        metric: f"prune {{model}} --sparsity 0.2 --set block_metric={metric} --out smaller"
        for metric in ("cosine", "euclidean", "mse", "mae")
    },
    **{
        metric: f"prune {{model}} --sparsity 0.2 --set channel_metric={metric} --out smaller"
        for metric in ("wanda", "magnitude", "random")
    },
}


@pytest.mark.parametrize("word", ELSEWHERE)
def test_the_command_says_what_to_do_instead(word, model, command):
    asked = ASKING.get(word, f"recover pruned --steps 1 --out recovered --{word} 1")
    error = command(*asked.format(model=model).split(), status=2).err
    assert ELSEWHERE[word] in error


def test_so_does_python(tmp_path):
    with pytest.raises(UsageError, match=ELSEWHERE["weight-decay"]):
        cfsp.recover("none", out=tmp_path / "out", weight_decay=0.1)
