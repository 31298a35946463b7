"""Floor 5: Hugging Face folders in and out."""

from megatron_lite.hf.convert import export_folder
from megatron_lite.hf.import_folder import import_folder
from megatron_lite.hf.verify import Verification, verify_folder

__all__ = ["Verification", "export_folder", "import_folder", "verify_folder"]
