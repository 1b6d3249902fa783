"""Models on the Hugging Face hub by name, `owner/name` or `owner/name@revision`: only the files that are read, or the cache's."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from qlr_jax.errors import QLRError
from qlr_jax.models.checkpoint import COMPANIONS, INDEX, SINGLE, named_weights, shards_of

_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w.-][\w./-]*))?")
_SMALL = ("config.json", "adapter_config.json", INDEX, *COMPANIONS, "*.jinja")


def parts(name: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) of a name on the hub; the revision is None where none is given, all of it for any other text.

    Example:
        >>> parts("org/llama@v1.0"), parts("org/llama"), parts("./llama")
        (('org/llama', 'v1.0'), ('org/llama', None), None)
    """
    match = _NAME.fullmatch(name)
    return (match["repo"], match["revision"]) if match else None


def snapshot(name: str) -> Path:
    """The folder, in the hub's cache, of a model's config, tokenizer and weights; what is not there yet is fetched.

    Without a network it is what an earlier call, or another tool, left there.

    Args:
        name: owner/name or owner/name@revision, a branch, tag or commit.

    Raises:
        QLRError: no such model or revision, one that needs a login, or one without safetensors; says what it holds instead.
    """
    found = parts(name)
    if found is None:
        raise QLRError(f"{name} is no name on the hub; give owner/name or owner/name@revision")
    repo, revision = found
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL)))
        listed = _listed(repo, folder)
        files = _cached(folder) if listed is None else listed
        wanted = _weights(folder, files)
        if missing := [file for file in wanted if not (folder / file).is_file()]:
            # by commit: a branch that moves on between the two calls would mix two models
            snapshot_download(repo, revision=folder.name, allow_patterns=missing)
    except QLRError:
        raise
    except Exception as error:  # the hub raises many kinds; each means that nothing was found
        raise QLRError(f"{name} is neither a local folder nor a model that the hub delivers ({_why(error)})") from error
    if not wanted and listed is None:
        raise QLRError(f"{name} is in the hub's cache without its weights, and the hub cannot be reached; connect or give a folder")
    if not wanted and not (folder / "adapter_config.json").is_file():
        others = [file for file in files if file.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors"))]
        held = f"it holds {', '.join(others[:3])}" if others else "it holds no weights"
        raise QLRError(f"{name} has neither {SINGLE} nor {INDEX} on the hub; {held}; give a model in safetensors, or a GGUF file")
    return folder


def config_file(name: str) -> Path:
    """config.json of a model on the hub, and nothing else of it.

    Args:
        name: as for `snapshot`.

    Raises:
        QLRError: the hub does not deliver it, and no earlier call has.
    """
    from huggingface_hub import hf_hub_download

    repo, revision = parts(name) or (name, None)
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:  # as above
        raise QLRError(f"{name} is no folder, and the hub does not deliver its config.json ({_why(error)})") from error


def _listed(repo: str, folder: Path) -> list[str] | None:
    """The names of a commit's files; None where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repo, revision=folder.name)
    except Exception:  # no network, in the words of whichever layer noticed
        return None


def _cached(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _weights(folder: Path, files: Collection[str]) -> list[str]:
    """The files of weights that transformers reads of these."""
    name = named_weights(folder) or next((file for file in (SINGLE, INDEX) if file in files), None)
    if name is None:
        return []
    return shards_of(folder / name) if name.endswith(".index.json") else [name]


def _why(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return "its owner wants readers to accept terms: do so on its page, and `hf auth login`"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
