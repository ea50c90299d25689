"""Everything that only a machine with a GPU can tell, in one command, within eight minutes.

    python benchmarks/gpu.py                     # prints a table, writes gpu-DATE-TIME.json
    python benchmarks/gpu.py --device cpu --tiny # the same code at tiny sizes: no measurement

Checks the device against the CPU and the arrays of the original, runs the tests marked `gpu`, and
times extraction, training and segmentation beside the usual way. Needs the checkout and PyTorch
with CUDA; whatever else is missing is left out by name. Exit status 1 if a check failed or a part
did not get through.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that nobody installed
    from benchmarks.gpu_parts.command import main

    sys.exit(main(__doc__))
