"""Uploading an adapter: the repository is made before training starts, so that a missing permission shows at once."""

import shutil
import tempfile
from pathlib import Path

import huggingface_hub

from ..model.adapter import write_for_transformers

# An adapter's folder holds checkpoints and logs too; these are what others need.
PUSHED = ("adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer*", "*.jinja", "special_tokens*")


def make_repository(name: str) -> None:
    """Raises ValueError, without the token in it, if the hub will not have it."""
    if huggingface_hub.get_token() is None:
        raise ValueError("`--push_to_hub` needs a login: run `hf auth login` first, or leave the flag out")
    try:
        huggingface_hub.HfApi().create_repo(name, exist_ok=True)
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors; a malformed name is a ValueError
        raise ValueError(f"`--hub_model_id` {name} cannot be written to: {error}") from None


def push(folder: Path, name: str) -> str:
    """Uploads the adapter in `folder`, spelled so that transformers and PEFT both read it. Returns its address."""
    with tempfile.TemporaryDirectory() as staged:
        for pattern in PUSHED:
            for file in folder.glob(pattern):
                if not file.is_symlink():  # a run writes none, and what one points to is not the run's
                    shutil.copy(file, staged)
        write_for_transformers(Path(staged))
        return str(huggingface_hub.HfApi().upload_folder(repo_id=name, folder_path=staged, commit_message="Adapter"))
