"""Fixtures that all tests share: tiny models and texts made here, and the real ones if present.

Nothing reaches for a network. `CFSP_CACHE` stays the user's, so that the demo model, which
takes a minute to convert, is converted only once on a machine.
"""

import gc
import io
import logging
import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from commands import Commands
from forks import Forks

# transformers reads these at import, so nothing above and no module-level import imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
# Modelling files of loaded checkpoints are copied here; test workers must not share the place.
_MODULES_CACHE = tempfile.TemporaryDirectory(prefix="cfsp-test-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES_CACHE.name

pytest.register_assert_rewrite("architecture_contract")
# A busy machine is no fault of a test. The examples are the same in every run, so that what fails
# is what was changed; `pytest --hypothesis-profile search` looks for what no run has met yet.
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=4000)
settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parent.parent
LONG = (
    "test_kills.py", "test_studies.py", "test_families_command.py", "test_together.py",
    "test_sharding.py", "test_core_only.py", "test_scale.py",
)  # fmt: skip

_WORDS = [
    "the", "of", "a", "model", "prunes", "keeps", "channel", "block", "weight", "token", "window",
    "text", "layer", "river", "stone", "light", "quiet", "green", "runs", "falls", "under", "over",
    "between", "small", "large", "number", "result", "measure", "plan", "train",
]  # fmt: skip


def pytest_collection() -> None:
    """Import torch where tests are, and not where they are handed out.

    transformers, which test modules import, remembers the functions of torch that it finds.
    """
    from shortcuts import take_shortcuts

    take_shortcuts()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long: started last, it would leave the other worker idle.

    The real model, then few tests that take long; then long files, which take long.
    """
    size_of = {path: path.stat().st_size for path in {item.path for item in items}}

    def place(item: pytest.Item) -> tuple[bool, bool, int]:
        is_real = item.get_closest_marker("real") is not None
        return not is_real, item.path.name not in LONG, -size_of[item.path]

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread in every test process: xdist gives each core a process of its own."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imports_stay() -> Iterator[None]:
    """Keep what was imported from the garbage collector, for which Trainer calls at every turn."""
    gc.freeze()
    yield
    gc.unfreeze()


def random_prose(words: int, seed: int) -> str:
    """Return reproducible nonsense with sentences and paragraphs."""
    generator = random.Random(seed)
    sentences = []
    while words > 0:
        length = min(words, generator.randint(4, 12))
        sentences.append(" ".join(generator.choices(_WORDS, k=length)) + ".")
        words -= length
    return "\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8))


@pytest.fixture
def command(capsys) -> Callable[..., Any]:
    """Runs a command in this process; gives what it printed, without what was printed before."""
    from bad_inputs.catalogue import exit_status

    def run(*argv: object, status: int = 0) -> Any:
        capsys.readouterr()
        assert exit_status([*map(str, argv)]) == status
        return capsys.readouterr()

    return run


@pytest.fixture
def noted(monkeypatch) -> Callable[..., list[Any]]:
    """Notes the calls of a function, which does its work all the same."""
    originals: dict[tuple[object, str], Callable[..., Any]] = {}

    def note(
        owner: Any, name: str, of: Callable[..., Any], dies_at: int = 0, seen: Any = None
    ) -> list[Any]:
        """Return the list of what `of` makes of the arguments; the nth call is interrupted."""
        notes: list[Any] = [] if seen is None else seen
        original = originals.setdefault((owner, name), getattr(owner, name))

        def noting(*args: Any, **options: Any) -> Any:
            notes.append(of(*args, **options))
            if len(notes) == dies_at:
                raise KeyboardInterrupt
            return original(*args, **options)

        monkeypatch.setattr(owner, name, noting)
        return notes

    return note


@pytest.fixture
def no_hub(monkeypatch) -> None:
    """A network without a hub: nothing listens on the port for discarding."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def splits_here(request, monkeypatch) -> None:
    """Lets llama.cpp split text in this process, except of the real model: another has to start."""
    from cfsp.checkpoint import llama_cpp

    def run(command: list[str], *, input: str, **_: Any) -> SimpleNamespace:
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        with redirect_stdout(io.StringIO()) as printed:
            try:
                llama_cpp._main(command[-1])
            except SystemExit as ended:
                return SimpleNamespace(returncode=ended.code)
        return SimpleNamespace(returncode=0, stdout=printed.getvalue())

    if request.node.get_closest_marker("real") is None:
        monkeypatch.setattr(llama_cpp, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """A cache of its own for what becomes of .gguf files."""
    monkeypatch.setenv("CFSP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of about 6000 words."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(random_prose(6000, seed=1))
    return path


@pytest.fixture(scope="session")
def few(text_file) -> dict[str, Any]:
    """What a calibration of a tiny model is asked for: few windows of the text."""
    return {"data": [str(text_file)], "samples": 4, "seqlen": 32, "device": "cpu"}


@pytest.fixture(scope="session")
def other_text_file(tmp_path_factory) -> Path:
    """Another text, sharing no sentence with the first."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text(random_prose(6000, seed=2).upper())
    return path


def byte_level_core(size: int, split: Any, texts: Sequence[str] = ()) -> Any:
    """Return a byte-level BPE of so many entries, trained on prose and on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([random_prose(2000, seed=0), *texts], trainer)
    return core


def byte_tokenizer(directory: Path, size: int, *, bos: bool = False, **more: Any) -> Any:
    """Return a byte-level BPE tokenizer of so many entries, made offline.

    It goes through the directory, so that it is the very object that loading a checkpoint gives.
    With `bos` it begins an input with BOS, as Llama's and Gemma's do.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = byte_level_core(size, ByteLevel(add_prefix_space=False))
    if bos:
        first = [("<s>", core.token_to_id("<s>"))]
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", **more
    ).save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


CHAT = {"chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Any:
    """A tokenizer of 320 entries."""
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), 320, **CHAT)


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory) -> Any:
    """The same, but one that begins an input with BOS."""
    return byte_tokenizer(tmp_path_factory.mktemp("bos-tokenizer"), 320, bos=True, **CHAT)


@pytest.fixture(scope="session")
def save(tokenizer, tmp_path_factory) -> Callable[[Any], Path]:
    """Saves a model with the tokenizer in a directory of its own, which it gives."""

    def save(model: Any, name: str = "saved") -> Path:
        directory: Path = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def short_kinds(monkeypatch) -> None:
    """Few words of each kind of the mixed text, because the test tokenizer is slow."""

    def short(kind: str) -> list[dict[str, str]]:
        texts = (
            " ".join(f"{kind} {number} river stone" for number in range(first, first + 30))
            for first in range(0, 600, 30)
        )
        return [{"text": text} for text in texts]

    monkeypatch.setattr("cfsp.text.offline.records", short)


@pytest.fixture(scope="session")
def tiny_checkpoint(save) -> Callable[[str], Path]:
    """Give the directory of a tiny random model by its name in `tiny_models.TINY_CONFIGS`."""
    from tiny_models import build_tiny_model

    return cache(lambda name: save(build_tiny_model(name), f"tiny-{name}"))


@pytest.fixture(scope="session")
def model(tiny_checkpoint) -> Path:
    """The tiny Llama."""
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def source(model) -> Any:
    """The tiny Llama as it is read."""
    from cfsp.checkpoint.reading import Checkpoint

    return Checkpoint(model)


@pytest.fixture
def copied(model, tmp_path) -> Path:
    """A copy of the tiny Llama, to change."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(scope="session")
def pruned(tmp_path_factory, model, text_file) -> Path:
    """A tiny Llama whose blocks have different widths."""
    import cfsp

    out = tmp_path_factory.mktemp("pruned") / "model"
    asked: dict[str, Any] = {"sparsity": 0.5, "multiple": 4, "samples": 8, "seqlen": 32}
    report = cfsp.prune(model, out=out, data=[str(text_file)], **asked)
    assert len(set(report.intermediate_sizes)) > 1
    return out


@pytest.fixture(scope="session")
def source_with_card(model, tmp_path_factory) -> Path:
    """A tiny Llama with a model card and a chat template more."""
    from report_runs import CARD

    directory = tmp_path_factory.mktemp("source") / "my-model"
    shutil.copytree(model, directory)
    (directory / "README.md").write_text(CARD)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").chmod(0o555)  # as caches that several share
    return directory


@pytest.fixture(scope="session")
def run(source_with_card, text_file, few, tmp_path_factory) -> Path:
    """What tests of `result` look at: half of the channels gone, repaired, and measured."""
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.pipeline import prune_checkpoint
    from cfsp.settings import EvaluationText, prune_settings

    out = tmp_path_factory.mktemp("result") / "run"
    asked = {**few, "samples": 8, "sparsity": 0.5, "multiple": 8, "channel_metric": "activation"}
    evaluation = EvaluationText((str(text_file),), windows=2, seqlen=32)
    settings = replace(prune_settings(asked), evaluation=evaluation)
    typed = f"cfsp prune {source_with_card} --sparsity 0.5 --out {out}"
    prune_checkpoint(open_checkpoint(source_with_card), out, settings, command=typed)
    return out


@pytest.fixture(scope="session")
def make_case(tmp_path_factory, tokenizer, text_file) -> Callable[..., Any]:
    """Prune a tiny model of a type on the prose, without repair (`family_contract.Case`)."""
    from family_contract import pruned_case
    from tiny_decoders import tiny_model

    def make(name: str, config: dict[str, Any], **asked: Any) -> Any:
        asked["data"] = [str(text_file)]
        dense = tiny_model(name, **config)
        return pruned_case(dense, tokenizer, tmp_path_factory.mktemp(name), asked)

    return make


@pytest.fixture(autouse=True)
def messages_stay() -> Iterator[None]:
    """Let a test that is another process of several, which says errors alone, leave no trace."""
    yield
    logger = logging.getLogger("cfsp")
    if logger.level == logging.ERROR:
        logger.setLevel(logging.INFO)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Fresh processes that need not import torch anew."""
    with Forks() as running:
        yield running


@pytest.fixture(scope="session")
def commands(forks) -> Commands:
    """Commands in processes of their own, which may die."""
    return Commands(forks)


@pytest.fixture
def models_start_quickly(monkeypatch) -> None:
    """Fork the processes that models are timed in from one that has imported torch.

    Its modules are not walked through when garbage is collected, which is before every run.
    """
    from shortcuts import begin_to_time

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["transformers.modeling_utils", "cfsp.speed.subjects"])
    monkeypatch.setattr("cfsp.speed.subjects.PROCESSES", processes)
    monkeypatch.setattr("cfsp.speed.subjects.end_with_parent", begin_to_time)


@pytest.fixture(scope="session")
def demo() -> Any:
    """The real SmolLM2-135M as a checkpoint."""
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.errors import CfspError

    try:
        return open_checkpoint("demo")
    except CfspError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def pruned_type(make_case) -> Callable[[str], Path]:
    """Gives the pruned tiny model of a type."""
    return cache(lambda name: make_case(name, {}, sparsity=0.4, multiple=8, samples=4).out)
