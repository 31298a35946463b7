"""Floor 1: what a run is. YAML files with flat keys become typed, frozen sections. No torch."""

from megatron_lite.config.config import Config, config_from_keys, load_config

__all__ = ["Config", "config_from_keys", "load_config"]
