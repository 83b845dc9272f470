"""What all tests run under, and the processes that they start.

Some tests compare to the last bit what was computed in batches of other shapes. On Intel's processors, Intel's math
library chooses its kernels by shape and alignment; told not to, before its first call, its results follow from their
inputs alone (MKL's "conditional numerical reproducibility", strict mode).
"""

from __future__ import annotations

import os
from pathlib import Path

if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
