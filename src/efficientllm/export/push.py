"""An exported folder on the hub, by huggingface_hub's own client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from efficientllm.errors import UsageError

STALE = ["*.safetensors", "*.safetensors.index.json"]


def check_push(repository: str, api: HfApi | None = None) -> None:
    """Before the work: is the name one (ORG/NAME), and is there a token? Raises UsageError."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push {repository}: {str(error).splitlines()[0]}") from error
    if repository.count("/") != 1:
        raise UsageError(f"--push {repository} is no repository; write it as ORG/NAME")
    if _token(api) is None:
        raise UsageError("there is no token for the hub; run `hf auth login` or set HF_TOKEN, then push again")


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool,
    api: HfApi | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> str:
    """Makes the repository where there is none, uploads the folder as one commit, and returns its address.

    Weights that lie in an existing repository go with that commit: left beside the new ones, shards of another number
    would be loaded with them. Raises UsageError, which never holds the token, where the hub refuses or cannot be
    reached.
    """
    api = api or HfApi()
    try:
        if api.repo_exists(repository):
            say(f"{repository} exists already: its weights are replaced (its history keeps them), who may see it stays")
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message="Model exported with efficientllm",
            delete_patterns=STALE,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:  # httpx's and requests' connection errors among OSError
        raise UsageError(f"cannot push to {repository}: {_reason(error, api)}; the folder {folder} is whole") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"httpx", "requests", "huggingface_hub"}:
            raise
        raise UsageError(f"cannot push to {repository}: {_reason(error, api)}; the folder {folder} is whole") from error
    return address


def _token(api: HfApi | None) -> str | None:
    own = getattr(api, "token", None)
    return own if isinstance(own, str) else get_token()


def _reason(error: BaseException, api: HfApi) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:300] or type(error).__name__
    token = _token(api)
    return text.replace(token, "***") if token else text
