"""The 16 released encoders by name, and files from the hub: its own cache, its own progress bars."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from aimv2.errors import UsageError
from aimv2.models.sizes import MODELS, EncoderConfig

OWNER = "apple"
LICENCE = "apple-amlr"  # of the released weights

# name -> revision that the released loader pins
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
PAIR_PARAMETERS = 436_680_193  # of the LiT pair (the released file)
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",  # SigLIP's
    "sentencepiece.bpe.model",  # AltCLIP's
    "special_tokens_map.json",
]  # never a pickle
CARD = "README.md"  # read for its licence; nothing needs it
INDEX = "model.safetensors.index.json"
LOOKED_FOR = ("config.json", "preprocessor_config.json")  # without them a model could be taken for another


def shape_of(name: str) -> EncoderConfig:
    """The row of the sizes table behind a released name."""
    return MODELS[name.removesuffix("-distilled").removesuffix("-lit")][0]


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def unreachable() -> str:
    """Why the hub can't be reached, "" where it can: its own client retries for most of a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the network says
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def download(repository: str, revision: str | None) -> Path:
    """The folder of a hub repository in the hub's own cache.

    A commit never changes: what the cache holds whole is taken without asking. A branch or a tag may have moved: the hub is
    asked first, and the cached copy serves, with a line on standard error, where it can't be reached.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        UsageError: no such repository or revision, or the hub can't be reached and the cache has not all of it; says what
            to download and where to put it.
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
            raise UsageError(f"MODEL {repository}: no revision {revision!r}; change revision") from None
        except RepositoryNotFoundError:
            raise UsageError(
                f"MODEL {repository}: no such repository on the hub, or a private one (then log in: hf auth login)"
            ) from None
        except UsageError:
            raise
        except Exception as error:  # whatever the network says
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if not commit and (folder := cached(repository, revision)):
        print(
            f"{repository}: the hub can't be reached ({why}); using commit {folder.name} of the cache", file=sys.stderr
        )
        return folder
    at = f" --revision {revision}" if revision else ""
    raise UsageError(
        f"MODEL {repository}: the hub can't be reached ({why}) and the cache has not all of it; where it can, run "
        f"`hf download {repository}{at} --local-dir DIR`, copy DIR here and give DIR as MODEL"
    )


def fetched(repository: str, revision: str | None) -> Path:
    """The folder, after asking the hub; what the cache has already is not fetched again.

    Raises:
        UsageError: the repository has no weights that are read here.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*WANTED, CARD]))
    if lacking_weights(folder):
        raise UsageError(f"MODEL {repository}: no .safetensors file in the repository, or not all that its index names")
    for name in (
        *LOOKED_FOR,
        "tokenizer.json",
        "vocab.json",
    ):  # what was not there stays known, as the hub's client has it
        if not (folder / name).is_file():
            note = _misses(folder) / name
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    return folder


def cached(repository: str, revision: str | None) -> Path | None:
    """The folder in the cache if it holds all that loading reads, else None; the hub is not asked."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=WANTED, local_files_only=True))
    except Exception:  # not there, or the client itself knows that files are missing
        return None
    return folder if complete(folder, repository) else None


def complete(folder: Path, repository: str) -> bool:
    """Whether a snapshot of the cache holds all that loading reads: a download that was stopped left some of it.

    Args:
        folder: ``.../models--OWNER--NAME/snapshots/COMMIT``.
        repository: owner/name; a pair (``-lit``) has a tokeniser.

    Returns:
        True where all weights, and ``config.json`` and ``preprocessor_config.json``, are there; a file that the hub is known
            not to have (a miss that its client noted) counts as there.
    """
    known = [(folder / name).is_file() or (_misses(folder) / name).is_file() for name in LOOKED_FOR]
    words = not repository.endswith("-lit") or any(
        all((folder / name).is_file() for name in names)
        for names in (("tokenizer.json",), ("vocab.json", "merges.txt"))
    )
    return not lacking_weights(folder) and all(known) and words


def lacking_weights(folder: Path) -> bool:
    """Whether weight files are missing: of those that the index names; without one, any that is no part of several."""
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
            return not all((folder / str(name)).is_file() for name in names)
        except (ValueError, KeyError, TypeError, AttributeError):
            return True
    return all(re.search(r"-\d{5}-of-\d{5}$", file.stem) for file in folder.glob("*.safetensors"))


def _misses(folder: Path) -> Path:
    """Where the hub's client notes which files a commit does not have."""
    return folder.parents[1] / ".no_exist" / folder.name


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Uploads a folder, making the repository where there is none; returns its address.

    Raises:
        UsageError: the hub can't be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if why := unreachable():
        raise UsageError(f"REPOSITORY {repository}: the hub can't be reached ({why}); nothing was uploaded")
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"REPOSITORY {repository}: the hub refuses ({why}); log in with: hf auth login") from None
    return str(address)
