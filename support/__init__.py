"""What every script stands on and nobody needs to read."""

import os

# Threads that wait for each other give their core up after 3,000 looks, else two runs side by side
# slow each other down. torch reads it once: whoever imports torch imports this first
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# What Apple's GPU lacks runs on the processor
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
