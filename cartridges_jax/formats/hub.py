"""Repositories of the Hugging Face hub, fetched into the hub library's own cache.

The library's settings apply: HF_HOME and HF_HUB_CACHE, HF_TOKEN or `hf auth login`, HF_ENDPOINT and
HF_HUB_OFFLINE. Only safetensors weights, configuration and tokenizer are fetched, never a pickle.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from cartridges_jax.errors import UserError, one_line
from cartridges_jax.formats.safetensors_files import CONFIG_FILE

_WANTED = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
]
# Copies in other formats are in subdirectories; `consolidated` is Mistral's second copy of the weights.
_UNWANTED = ["*/*", "consolidated*"]
_SECONDS_TO_ANSWER = 10.0

_PART = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".json")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, at a branch, tag or commit."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


def parse(text: str) -> Repository | None:
    """`org/name` or `org/name@revision`; None if `text` is neither, or looks like the path of a file."""
    match = _REPOSITORY.fullmatch(text)
    if match is None or match["name"].endswith(_FILE_ENDINGS):
        return None
    return Repository(match["name"], match["revision"])


def fetched(repository: Repository) -> Path:
    """The directory of the repository's files; those that the hub's cache lacks are fetched.

    An unreachable hub does not matter once everything is in the cache.

    Raises:
      UserError: the hub cannot be reached, has no such repository or revision, or asks for a token or for
        the acceptance of a license; or the repository holds no safetensors.
    """
    import huggingface_hub  # slow to import, and most programs do not need it
    from huggingface_hub import constants, errors

    wanted = {"revision": repository.revision, "allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:
            # snapshot_download waits forever for a silent server; this request does not.
            huggingface_hub.HfApi().model_info(
                repository.name, revision=repository.revision, timeout=_SECONDS_TO_ANSWER
            )
        path = huggingface_hub.snapshot_download(
            repository.name, local_files_only=offline, etag_timeout=_SECONDS_TO_ANSWER, **wanted
        )
    except errors.RevisionNotFoundError as error:
        raise UserError(_explanation(repository, error)) from error
    except Exception as error:  # the errors of the library and of its dependencies share no class
        try:
            path = huggingface_hub.snapshot_download(repository.name, local_files_only=True, **wanted)
        except (OSError, ValueError):  # not in the cache, or not the name of a repository
            raise UserError(_explanation(repository, error)) from error
        print(f"{repository}: {one_line(error)}; using the copy in the cache", file=sys.stderr, flush=True)
    directory = Path(path)
    if not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{str(repository)!r}: the repository has no safetensors weights; choose one that has, or give the path "
            "of a GGUF file"
        )
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{str(repository)!r}: the repository has no {CONFIG_FILE}; it is not a transformers model")
    return directory


def _explanation(repository: Repository, error: Exception) -> str:
    from huggingface_hub import constants, errors

    start = f"{str(repository)!r} is no path here, and the Hugging Face hub"
    page = f"{constants.ENDPOINT}/{repository.name}"
    # From the narrow class to the wide one: GatedRepoError is a RepositoryNotFoundError.
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{start} gives it only to those who accepted its terms: do so at {page}, then set HF_TOKEN to your token"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{start} has no such repository, or a private one: check the name, or set HF_TOKEN to your token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{start} has no revision {repository.revision!r} of it: choose a branch, tag or commit at {page}"
    if constants.HF_HUB_OFFLINE:
        return f"{start} must not be asked (HF_HUB_OFFLINE is set): unset it, or fetch the model into {constants.HF_HUB_CACHE}"
    return (
        f"{start} did not deliver it ({type(error).__name__}: {one_line(error)}): check the network, or fetch the "
        "model elsewhere and give the directory's path"
    )
