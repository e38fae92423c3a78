"""Model directories in and out: safetensors by slices, GGUF import, the store's pull, export."""
