"""A pruned directory as loaders see it that read every weight file they find in it."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline

import cfsp
from builders import edit_json, entries, raising
from cfsp.checkpoint import gguf_import, locating
from cfsp.checkpoint.own_files import MODELING_FILE, copy_travelling_files
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import CheckpointError, OutputError, TextError
from cfsp.text.sources import TextSource

# What one or the other loader takes for weights.
WEIGHTS = ("safetensors", "bin", "pt", "pth", "npz", "gguf", "h5", "msgpack", "ckpt")


def test_every_weight_file_holds_tensors_of_the_model_only(pruned):
    files = [path for ending in WEIGHTS for path in pruned.rglob(f"*.{ending}")]
    assert {path.suffix for path in files} == {".safetensors"}
    found: dict[str, torch.Tensor] = {}
    for path in files:
        found.update(load_file(path))
    model = cfsp.load(pruned)
    assert set(found) == set(model.state_dict()) - set(model.all_tied_weights_keys)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in found.items())


def test_a_pipeline_does_not_complain(pruned, monkeypatch):
    from transformers.pipelines import base

    complaints: list[str] = []
    monkeypatch.setattr(base.logger, "error", complaints.append)
    base.logger.error("seen")
    write = pipeline("text-generation", model=str(pruned), trust_remote_code=True)
    assert write("a", max_new_tokens=1)
    assert complaints == ["seen"]


def test_what_travels_is_fetched_from_a_hub(tmp_path, monkeypatch):
    texts = [
        "LICENSE.txt",
        "LICENCE",
        "COPYING",
        "MODEL_LICENSE",
        "THIRD_PARTY_NOTICES.md",
        "NOTICE",
        "NOTICE.md",
        "USE_POLICY.md",
        "qwen.tiktoken",
    ]
    of_processor = ["preprocessor_config.json", "processor_config.json"]
    of_processor += ["video_preprocessor_config.json", "chat_template.json"]
    names = [*texts, *of_processor, "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    kept, repository = tmp_path / "kept", tmp_path / "repository"
    repository.mkdir()
    # What describes the source's own weights.
    own = {"model.safetensors.index.json", "params.json", "trainer_state.json"}
    for name in (*names, *own, "pytorch_model.bin", "modeling.py", MODELING_FILE):
        (repository / name).write_text(name)
    fetched: list[str] = []

    def snapshot(
        _: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_more: object
    ) -> str:
        every = [path.name for path in repository.iterdir()]
        # Weights that are not read.
        every += ["last-checkpoint/model.safetensors", "original/model.safetensors"]
        every += ["consolidated.00.pth", "consolidated.safetensors"]
        fetched.extend(
            filter_repo_objects(
                every, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(repository)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    kept.mkdir()
    copy_travelling_files(locating.locate_model("no-one/nothing"), kept)
    # Our own modelling file is written anew; `cfsp verify` compares it.
    assert entries(kept) == set(names)
    assert set(fetched) == {*names, *own, MODELING_FILE}


def test_code_of_a_tokenizer_that_stays_behind_is_not_named(tokenizer, tmp_path):
    """As of ERNIE 4.5, whose tokenizer transformers reads without its code."""
    source, kept = tmp_path / "source", tmp_path / "kept"
    tokenizer.save_pretrained(source)
    own = {"AutoTokenizer": ["own.Own", None]}
    edit_json(source / "tokenizer_config.json", lambda fields: fields.update(auto_map=own))
    (source / "own.py").write_text("raise SystemExit('the code was run')")
    (source / "processor_config.json").write_text('{"auto_map"')  # no JSON, and no fault of ours
    part = {"feature_extractor_type": "WhisperFeatureExtractor"}
    whole = {"feature_extractor": part | {"auto_map": own}}
    (source / "preprocessor_config.json").write_text(json.dumps(whole))
    kept.mkdir()
    copy_travelling_files(source, kept)
    found = AutoTokenizer.from_pretrained(kept, trust_remote_code=True)
    assert found("a river")["input_ids"] == tokenizer("a river")["input_ids"]
    assert found.chat_template == tokenizer.chat_template
    assert (kept / "processor_config.json").read_bytes() == b'{"auto_map"'
    beside = json.loads((kept / "preprocessor_config.json").read_text())
    assert beside == {"feature_extractor": part}


def test_a_snapshot_that_others_fetched_in_part_is_read_and_told(tmp_path, monkeypatch, caplog):
    def fails(*_: object, **_more: object) -> None:
        class IncompleteSnapshotError(LocalEntryNotFoundError):
            snapshot_path = str(tmp_path)

        raise IncompleteSnapshotError("1 file(s) are missing (README.md)")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    assert locating.locate_model("no-one/nothing") == tmp_path
    assert "1 file(s) are missing (README.md)" in caplog.text


def test_no_cache_of_the_hub_has_to_be_writable(pruned, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    unwritable = str(tmp_path / "file" / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", unwritable)
    assert Checkpoint(pruned, "pruned").units
    assert cfsp.load(pruned).config.model_type == "llama"


def test_a_place_that_cannot_be_written_to_says_what_to_set(tmp_path, monkeypatch):
    fails = raising(PermissionError(13, "Permission denied", "/read-only/hub"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(CheckpointError, match=r"/read-only/hub: Permission denied.*set HF_HOME"):
        locating.locate_model("no-one/nothing")
    datasets = SimpleNamespace(load_dataset=fails)
    monkeypatch.setattr("cfsp.text.records.import_datasets", lambda: datasets)
    with pytest.raises(TextError, match=r"Salesforce/wikitext cannot be read.*set HF_HOME"):
        list(TextSource("wikitext2", "evaluation").documents())
    (tmp_path / "file").touch()
    monkeypatch.setenv("CFSP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(gguf_import, "gguf_reader", lambda _: None)
    monkeypatch.setattr(gguf_import, "_stored_dtype", lambda *_: torch.float32)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(OutputError, match="set CFSP_CACHE to a directory"):
        gguf_import.import_gguf(tmp_path / "model.gguf")
