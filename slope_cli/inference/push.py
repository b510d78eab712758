"""Upload of an exported folder to the Hugging Face Hub, or to the mirror that $HF_ENDPOINT names."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from slope_cli.checkpoint import run_folder
from slope_cli.checkpoint.hf_folder import model_folder
from slope_cli.data.tokenizer import hub_answers
from slope_cli.errors import SlopeError, UsageError, first_line
from slope_cli.utils.files import require_no_way_out

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"
OWN = ["finetune/*", ".*"]
"""What may be in an exported folder and is not the model: fine-tunings, and hidden files."""


def require_hub(name: str) -> None:
    """Check all that can be checked before a folder is written: the name, the network, the token.

    Raises:
        UsageError: not NAMESPACE/NAME, no token, or one that the hub does not know.
        SlopeError: the hub does not answer.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or "--" in name or ".." in name or len(name) > 96:
        raise UsageError(f"--push {name}: must be NAMESPACE/NAME, of letters, digits and single - _ .")
    if not hub_answers():
        raise SlopeError(
            f"--push: {constants.ENDPOINT} does not answer; check the network, HF_ENDPOINT, HF_HUB_OFFLINE"
        )
    with _clear(name):
        HfApi().whoami()


def require_export(folder: Path) -> None:
    """UsageError unless a folder holds a model of transformers, and nothing that leads out of it."""
    if run_folder.is_run(folder):
        raise UsageError(f"{folder}: is a run; give OUT, the folder to export it to, too")
    folder = model_folder(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: is not an exported folder (no config.json)")
    require_no_way_out(folder)


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Make a repository's files those of a folder, in a commit; its history keeps what was there before.

    Args:
        folder: what `export`, `export_packed` or `slope finetune` wrote, or any model folder.
        name: NAMESPACE/NAME; a repository of that name is made if there is none.
        public: whether everyone may see it. An existing repository must be so, or not, already.

    Returns:
        The repository's address.

    Raises:
        UsageError: as `require_export`, no right to write, or a repository that is public, or not, against `public`.
        SlopeError: the upload failed.
    """
    require_export(folder)
    folder = model_folder(folder)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with _clear(name, f"; then `slope export {folder} --push {name}` uploads it"):
        try:
            private = bool(api.model_info(name).private)
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public)
            private = not public
        if private is public:
            there, word = ("private", "leave out") if private else ("public", "add")
            raise UsageError(f"--push {name}: this repository is {there}; {word} --public, or choose another name")
        message = "Upload a model exported by slope"
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[*OWN], delete_patterns=["*"]
        )
    return f"{constants.ENDPOINT}/{name}"


@contextlib.contextmanager
def _clear(name: str, then: str = "") -> Iterator[None]:
    """Turn the hub's errors into one line, which ends with what to do then."""
    try:
        yield
    except SlopeError:
        raise
    except Exception as error:  # HTTP clients' errors, Xet's and those of malformed answers share no base class
        # A failed upload of one file is told as a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        if isinstance(cause, LocalTokenNotFoundError):
            fault: SlopeError = UsageError(f"--push {name}: no token; {LOGIN}{then}")
        elif status == 401:
            fault = UsageError(f"--push {name}: the hub does not accept the token; {LOGIN}{then}")
        elif status in (403, 404):
            fault = UsageError(f"--push {name}: the token has no right to write there; {LOGIN}{then}")
        elif isinstance(cause, HfHubHTTPError):
            fault = SlopeError(f"--push {name}: the hub answered {status}: {cause.server_message or ''}{then}")
        else:
            fault = SlopeError(f"--push {name}: the connection failed: {first_line(cause)}{then}")
        raise fault from error
