"""The oldest versions the engine works with."""

from transformers.utils.versions import require_version


def require(*requirements: str) -> None:
    """Raises ImportError with the version found, the one needed and what to do, for requirements like "torch>=2.11"."""
    for requirement in requirements:
        require_version(requirement, f'upgrade with: pip install "{requirement}"')
