"""LoRA and DoRA on a frozen model, as PEFT has them: configuration, matching, layers, files, merging."""

from entrenar.adapters.config import LoraConfig
from entrenar.adapters.files import load_adapter, read_adapter_config, save_adapter, write_adapter
from entrenar.adapters.merge import Erased, Proof, merge_adapter, merged, merged_config
from entrenar.adapters.model import (
    Counts,
    active_adapter,
    adapt,
    adapter_config,
    adapter_names,
    adapter_tensors,
    count,
    remove_adapter,
    use_adapter,
)

__all__ = [
    "Counts", "Erased", "LoraConfig", "Proof", "active_adapter", "adapt", "adapter_config", "adapter_names",
    "adapter_tensors", "count", "load_adapter", "merge_adapter", "merged", "merged_config", "read_adapter_config",
    "remove_adapter", "save_adapter", "use_adapter", "write_adapter",
]  # fmt: skip
