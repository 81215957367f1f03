"""Everything that knows another library.

`trainer` is imported on its own: it loads transformers' trainer.
"""

from .peft import PatchReport, patch_peft, unpatch_peft
from .peft_scope import patched_peft

__all__ = ["PatchReport", "patch_peft", "patched_peft", "unpatch_peft"]
