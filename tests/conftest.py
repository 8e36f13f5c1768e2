"""One thread a test process: teams of threads on two cores slow each other down, up to a hundredfold.

Set before NumPy and PyTorch are loaded, and inherited by the processes that tests start.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
