"""PEFT models: patched, unpatched, and in a trainer.

`callback` is imported on its own: it loads transformers' trainer.
"""

from .patch import PatchReport, patch_peft, unpatch_peft
from .scope import patched_peft

__all__ = ["PatchReport", "patch_peft", "patched_peft", "unpatch_peft"]
