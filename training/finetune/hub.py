"""Uploading an adapter. The repository is created before training, so that a missing permission shows at once."""

import shutil
import tempfile
from pathlib import Path

import huggingface_hub

from ..model.adapter import write_for_transformers

# The output folder holds checkpoints and logs too; only these files are uploaded.
PUSHED = ("adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer*", "*.jinja", "special_tokens*")


def make_repository(name: str) -> None:
    """Create the repository `name`, if need be.

    Raises:
        ValueError: no login, no permission or a malformed name. The message does not contain the token.
    """
    if huggingface_hub.get_token() is None:
        raise ValueError("`--push_to_hub` needs a login: run `hf auth login` first, or leave the flag out")
    try:
        huggingface_hub.HfApi().create_repo(name, exist_ok=True)
    except (OSError, ValueError) as error:  # the hub raises OSErrors; a malformed name is a ValueError
        raise ValueError(f"`--hub_model_id` {name} cannot be written to: {error}") from None


def push(folder: Path, name: str) -> str:
    """Upload the adapter in `folder`, in the spelling that both transformers and PEFT read. Returns its URL."""
    with tempfile.TemporaryDirectory() as staged:
        for pattern in PUSHED:
            for file in folder.glob(pattern):
                if not file.is_symlink():  # a run writes no links; the target is not the run's file
                    shutil.copy(file, staged)
        write_for_transformers(Path(staged))
        return str(huggingface_hub.HfApi().upload_folder(repo_id=name, folder_path=staged, commit_message="Adapter"))
