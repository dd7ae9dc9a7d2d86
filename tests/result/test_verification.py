"""`cfsp verify`: whole checkpoints pass, and every kind of change is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from report_runs import changed_copy


def test_what_cfsp_wrote_passes(run, command):
    found = json.loads(command("verify", run, "--json").out)
    assert found["verified"] is True and found["files"] > 5
    assert command("verify", run).out.endswith(f"{found['files']} files are as they were written\n")


def test_what_was_trained_alone_has_no_plan(run, tmp_path, command):
    copy = changed_copy(run, tmp_path / "copy", lambda manifest: manifest.pop("plan_digest"))
    assert "cfsp_plan.json is not in cfsp.json" in command("verify", copy, status=2).err
    (copy / "cfsp_plan.json").unlink()
    command("verify", copy)


def _flip_a_byte(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _another_tensor(directory: Path) -> None:
    save_file({"x": torch.zeros(1)}, directory / "model-extra.safetensors")


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return edit


def _without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _with(name: str, text: str = "") -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_byte, "model.safetensors has changed"),
        (_another_tensor, "model-extra.safetensors is not in cfsp.json"),
        (_edit("cfsp_plan.json", "0.5", "0.4"), "cfsp_plan.json has changed"),
        (_without("cfsp_plan.json"), "cfsp_plan.json is missing"),
        (_without("modeling_cfsp.py"), "modeling_cfsp.py is missing"),
        (_edit("modeling_cfsp.py", "import", "import os\nimport"), "modeling_cfsp.py has changed"),
        (_with("setup.py"), "setup.py is not in cfsp.json"),
        (_edit("config.json", '"rms_norm_eps": ', '"rms_norm_eps": 1'), "config.json has changed"),
        (_edit("generation_config.json", "{", '{"top_k": 1, '), "generation_config.json has"),
        (_without("generation_config.json"), "generation_config.json is missing"),
        (_edit("tokenizer.json", '"Ġ', '"G'), "tokenizer.json has changed"),
        (_edit("chat_template.jinja", "for", "if"), "chat_template.jinja has changed"),
        (_edit("additional_chat_templates/tool.jinja", "m", "n"), "chat_templates/tool.jinja has"),
        (_with("adapter_config.json", "{}"), "has an adapter (adapter_config.json)"),
        (_edit("cfsp.json", ".safetensors", ".bin"), "model.safetensors is not in cfsp.json"),
        (_without("model.safetensors"), "model.safetensors"),
    ],
)  # fmt: skip
def test_every_change_is_named(run, tmp_path, damage, message, command):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    damage(copy)
    error = command("verify", copy, status=2).err
    assert message in error
    assert error.count("\n") == 1


def test_notes_and_licences_may_change(run, tmp_path, command):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for name in ("README.md", "LICENSE.txt", "cfsp.statistics"):
        (copy / name).write_text("other")
    command("verify", copy)


def test_what_is_copied_of_a_folder_that_cannot_be_written_to_can_be_deleted(run, source_with_card):
    before, after = (each / "additional_chat_templates" for each in (source_with_card, run))
    assert [bool(each.stat().st_mode & 0o200) for each in (before, after)] == [False, True]
