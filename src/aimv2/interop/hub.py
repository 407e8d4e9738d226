"""The 16 released encoders by name, and downloads from the Hugging Face hub through its own client and cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aimv2.errors import UsageError, first_line
from aimv2.io import parse_json, read_file, say
from aimv2.models.sizes import MODELS, EncoderConfig

OWNER = "apple"
LICENCE = "apple-amlr"  # of the released weights

# name -> revision pinned by the released loader
RELEASED = {
    "aimv2-large-patch14-224": "ac764a25c832c7dc5e11871daa588e98e3cdbfb7",
    "aimv2-huge-patch14-224": "9e0bab0e0abb7b20796d2d0b37f39b7c3b1c1af1",
    "aimv2-1B-patch14-224": "4d24a422f71e87d327d476bc405030fe6593d8b1",
    "aimv2-3B-patch14-224": "df1cbc288096c9742ec8bd6709ff82757972338c",
    "aimv2-large-patch14-336": "639423ae9f07319d24a7fc431b61908110d08d3a",
    "aimv2-huge-patch14-336": "21528bd53a2438a84162e79f1f9a46453b88004c",
    "aimv2-1B-patch14-336": "5a15f23f6757776fdd487283353a018677621939",
    "aimv2-3B-patch14-336": "d1adb39ee92dfd7ecf3114b1ee3aa7e9027ce98f",
    "aimv2-large-patch14-448": "cefb13f21003bdadba65bfbee956c82b976cd23d",
    "aimv2-huge-patch14-448": "44e6440a24a8ea966ad0deadf5399a22d852bcc0",
    "aimv2-1B-patch14-448": "7f292735d3a07a911559c0fabb3ad3e9d141713f",
    "aimv2-3B-patch14-448": "70810b618e4456b724bacc8ef4d2d038060ceda6",
    "aimv2-large-patch14-224-distilled": "d6d09b071e8ba31735c5e05ccd4b2a393020ce90",
    "aimv2-large-patch14-336-distilled": "8fe1704e5cc1c80cefc99c194afcefe21dff1faa",
    "aimv2-large-patch14-native": "cfe7bdbbc924a5f65272d5e2c27fe5f61771a629",
    "aimv2-large-patch14-224-lit": "c2cd59a786c4c06f39d199c50d08cc2eab9f8605",
}
PAIR_PARAMETERS = 436_680_193  # parameters of the released LiT pair
WANTED = [  # never a pickle; spiece.model is SigLIP's, sentencepiece.bpe.model AltCLIP's
    *("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer*.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("special_tokens_map.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
]
SHARD = re.compile(r"-\d{5}-of-(\d{5})$")  # ends the name of one of several weight files
CARD = "README.md"  # read for its licence only
INDEX = "model.safetensors.index.json"
REQUIRED = ("config.json", "preprocessor_config.json")  # without them a model could be mistaken for another


def shape_of(name: str) -> EncoderConfig:
    """Encoder config of a released name."""
    return MODELS[name.removesuffix("-distilled").removesuffix("-lit")][0]


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def unreachable() -> str:
    """Why the hub can't be reached, "" where it can; the hub's own client retries for most of a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # any network error
        return first_line(error)
    return ""


@contextmanager
def offline_if_unreachable() -> Iterator[str]:
    """Gives why the hub can't be reached, "" where it can; where not, its client uses the cache at once, without retries."""
    from huggingface_hub import constants

    before, why = constants.HF_HUB_OFFLINE, unreachable()
    constants.HF_HUB_OFFLINE = before or bool(why)
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


def download(repository: str, revision: str | None) -> Path:
    """Download a hub repository into the hub client's cache and return its folder.

    A commit never changes: a complete copy in the cache is used without a request. A branch or a tag may have moved: the hub is
    queried first, and where it can't be reached the cached copy is used, with a line on standard error.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        UsageError: no such repository or revision, or the hub can't be reached and the cache is incomplete; says what to
            download and where to put it.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    commit = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    if commit and (folder := cached(repository, revision)):
        return folder
    why = unreachable()
    if not why:
        try:
            return fetched(repository, revision)
        except RevisionNotFoundError:
            raise UsageError(
                f"MODEL {repository}: no revision {revision!r}; change revision", option="revision", code="not-found"
            ) from None
        except RepositoryNotFoundError:
            raise UsageError(
                f"MODEL {repository}: no such folder here, and no such repository on the hub, or a private one "
                "(then log in: hf auth login)",
                code="not-found",
            ) from None
        except UsageError:
            raise
        except Exception as error:  # any network error
            why = first_line(error)
    if not commit and (folder := cached(repository, revision)):
        say(f"{repository}: the hub can't be reached ({why}); using commit {folder.name} of the cache")
        return folder
    at = f" --revision {revision}" if revision else ""
    raise UsageError(
        f"MODEL {repository}: no such folder here, the hub can't be reached ({why}) and the cache is incomplete; "
        "on a machine with access, run "
        f"`hf download {repository}{at} --local-dir DIR`, copy DIR here and give DIR as MODEL",
        code="not-found",
    )


def fetched(repository: str, revision: str | None) -> Path:
    """Download what the cache lacks and return the folder.

    Raises:
        UsageError: the repository has no weights that are read here.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*WANTED, CARD]))
    if lacking_weights(folder):
        raise UsageError(
            f"MODEL {repository}: no .safetensors file in the repository, or not all that its index names",
            code="not-found",
        )
    for name in (*REQUIRED, "tokenizer.json", "vocab.json"):  # note what the repository lacks, as the hub's client does
        if not (folder / name).is_file():
            note = _misses(folder) / name
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    return folder


def cached(repository: str, revision: str | None) -> Path | None:
    """The folder in the cache if it is complete, else None; no request is made."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=WANTED, local_files_only=True))
    except Exception:  # not cached, or the client knows that files are missing
        return None
    return folder if complete(folder, repository) else None


def complete(folder: Path, repository: str) -> bool:
    """Whether a snapshot in the cache holds everything that loading reads (an interrupted download does not).

    Args:
        folder: ``.../models--OWNER--NAME/snapshots/COMMIT``.
        repository: owner/name; a pair (``-lit``) has a tokeniser.

    Returns:
        True if all weights, ``config.json`` and ``preprocessor_config.json`` are there; a file that the repository is known to
            lack (noted by the hub's client) counts as there.
    """
    newer = (folder / "processor_config.json").is_file()  # holds what preprocessor_config.json held
    known = [
        (folder / name).is_file() or (_misses(folder) / name).is_file() or (newer and name == REQUIRED[1])
        for name in REQUIRED
    ]
    tokenizer = not repository.endswith("-lit") or any(
        all((folder / name).is_file() for name in names)
        for names in (("tokenizer.json",), ("vocab.json", "merges.txt"))
    )
    return not lacking_weights(folder) and all(known) and tokenizer


def indexed_files(folder: Path) -> list[str]:
    """Names of the weight files in the index.

    Raises:
        UsageError: the index can't be read.
    """
    try:
        return sorted({str(name) for name in parse_json(read_file(folder / INDEX))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / INDEX} can't be read: {error!r}", code="unreadable") from None


def lacking_weights(folder: Path) -> bool:
    """Whether weight files are missing: those that the index names, or without an index any complete file."""
    if (folder / INDEX).is_file():
        try:
            return not all((folder / name).is_file() for name in indexed_files(folder))
        except UsageError:
            return True
    return all(SHARD.search(file.stem) for file in folder.glob("*.safetensors"))


def _misses(folder: Path) -> Path:
    """Folder where the hub's client notes the files that a commit lacks."""
    return folder.parents[1] / ".no_exist" / folder.name


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload a folder, creating the repository if needed; returns its URL.

    Raises:
        UsageError: the hub can't be reached, or rejects the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if why := unreachable():
        raise UsageError(
            f"REPOSITORY {repository}: the hub can't be reached ({why}); nothing was uploaded", code="not-found"
        )
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UsageError(
            f"REPOSITORY {repository}: the hub rejected the upload ({first_line(error)}); log in with: hf auth login"
        ) from None
    return str(address)
