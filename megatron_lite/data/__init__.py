"""Floor 2: text → tokens → samples. Nothing here imports torch except :mod:`megatron_lite.data.batches`."""
