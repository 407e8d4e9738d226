"""The 16 released encoders by name, and files from the hub: its own cache, its own progress bars."""

from __future__ import annotations

import re
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
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
]  # never a pickle


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
    """The folder of a hub repository in the hub's own cache; what is there already is not fetched again.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        UsageError: no such repository or revision, or the hub can't be reached and the cache has nothing; says what to
            download and where to put it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def fetch(offline: bool) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=WANTED, local_files_only=offline))

    try:
        return complete(fetch(True))
    except Exception:  # not in the cache, or half of it
        why = unreachable()
    if not why:
        try:
            return complete(fetch(False))
        except RevisionNotFoundError:
            raise UsageError(f"MODEL {repository}: no revision {revision!r}; change revision") from None
        except RepositoryNotFoundError:
            raise UsageError(
                f"MODEL {repository}: no such repository on the hub, or a private one (then log in: hf auth login)"
            ) from None
        except Exception as error:  # whatever the network says
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    at = f" --revision {revision}" if revision else ""
    raise UsageError(
        f"MODEL {repository}: the hub can't be reached ({why}); where it can, run `hf download {repository}{at} "
        "--local-dir DIR`, copy DIR here and give DIR as MODEL"
    )


def complete(folder: Path) -> Path:
    """``folder``, if it holds weights.

    Raises:
        FileNotFoundError: it does not.
    """
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(folder)
    return folder


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
