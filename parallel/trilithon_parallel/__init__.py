"""The parallel core: many ranks, one model. Importing it loads no torch; its rooms do."""

import os

# oneDNN keeps what it made for each of the last 1,024 shapes that it multiplied, megabytes each. Batches of ever new
# lengths meet ever new shapes, and a training process grew by hundreds of MiB; these few are those of one layer.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
