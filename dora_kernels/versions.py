"""The engine's version, and the oldest ones it works with."""

from transformers.utils.versions import require_version

__version__ = "0.1.0"


def require(*requirements: str) -> None:
    """Raises ImportError with the version found, the one needed and what to do, for requirements like "torch>=2.11"."""
    for requirement in requirements:
        require_version(requirement, f'upgrade with: pip install "{requirement}"')
