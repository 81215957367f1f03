"""`python -m dora_kernels`: what would run here, and whether it computes the right thing."""

import sys

from .doctor import main

sys.exit(main())
