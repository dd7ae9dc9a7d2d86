"""A finished directory on the Hugging Face hub: private unless asked otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.checkpoint.own_files import check_links
from cfsp.errors import CfspError, OutputError, UsageError, first_line

# Weights, or what stands for them, of the layouts that prune, recover and export write.
_WEIGHTS = ("*.safetensors", "*.gguf", "openvino_model.bin")
# Weights of one model, whole or in shards: of an earlier upload none may stay beside the new ones,
# because loaders prefer the single file, or read every file.
_ONE_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
)
# Unfinished work, and what editors and tools leave behind.
_LEFT_HERE = (".*", ".*/**", "**/.*")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    repository: str  # OWNER/NAME
    url: str
    private: bool
    commit: str
    notes: tuple[str, ...]  # what the page will lack, one sentence each


def push(directory: str | Path, repository: str, *, public: bool = False) -> Pushed:
    """Upload a directory as one commit into a model repository, which is made if there is none.

    Shards and single files of safetensors that an earlier upload left there are deleted if this one
    brings others; every other file stays.

    The token is that of the hub's own login (`hf auth login`, or HF_TOKEN). Of a repository that
    exists `public` has to be as it is.

    Raises:
        UsageError: the name cannot be one, or the repository is public and `public` was not said.
        OutputError: there is nothing to upload, nobody is logged in, or the hub refuses.
        CheckpointError: a link would upload something from elsewhere.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    directory = Path(directory)
    if re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repository) is None:
        raise UsageError(f"a repository is called OWNER/NAME, found {repository!r}")
    if not any(_files(directory, _WEIGHTS)):
        raise OutputError(
            f"{directory} has no weights to upload: expected a directory that prune, recover or "
            "export wrote"
        )
    check_links(directory, folders=None)
    api = HfApi(library_name="cfsp")
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        private = bool(api.model_info(made.repo_id).private)
        if not private and not public:
            raise UsageError(
                f"{made.repo_id} exists and is public; add --public to upload it for everybody, or "
                "name another repository"
            )
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=directory,
            ignore_patterns=list(_LEFT_HERE),
            # What is uploaded is not deleted.
            delete_patterns=list(_ONE_MODEL) if any(_files(directory, _ONE_MODEL)) else None,
            commit_message="Upload by cfsp",
        )
    except LocalTokenNotFoundError as error:
        raise OutputError(
            "nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise OutputError("the hub is switched off by HF_HUB_OFFLINE; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        advice = (
            "; log in with a token that may write: `hf auth login`, or set HF_TOKEN"
            if status in (401, 403)
            else "; try again, nothing was changed by halves"
        )
        raise OutputError(f"the hub refuses {repository} ({status}){advice}") from error
    except CfspError:
        raise
    except Exception as error:  # of the HTTP library, whichever the client uses
        raise OutputError(
            f"the hub cannot be reached ({first_line(error)}); check the network and try again"
        ) from error
    return Pushed(made.repo_id, str(made), private, commit.oid, _lacking(directory))


def _files(directory: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in directory.glob(pattern))


def _lacking(directory: Path) -> tuple[str, ...]:
    """Return what the hub cannot show because the card does not say it."""
    from huggingface_hub import ModelCard

    card = directory / "README.md"
    if not card.is_file():
        return ("there is no README.md, so the page shows no base model and no license",)
    text = card.read_text(encoding="utf-8")
    data: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    named = {"base_model": "base model", "license": "license", "pipeline_tag": "task"}
    return tuple(
        f"README.md names no {what}: add `{key}: ...` between its dashes"
        for key, what in named.items()
        if not data.get(key)
    )
