"""Floor 4: Hugging Face folders in and out."""
