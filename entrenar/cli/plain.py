"""A model as one of floats: its adapter merged, storage formats decoded. For writers of other programs' files."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from entrenar.adapters.merge import merged, merged_config
from entrenar.kernels import unpack
from entrenar.kernels.packed import Packed
from entrenar.llama import Llama
from entrenar.nn import unfilled


def plain(model: Llama, adapter: str | None) -> Llama:
    """The model itself where it is one of floats without this adapter; else a new one, all of it in memory."""
    if adapter is None and not any(True for _ in model.named_packed()):
        return model
    with unfilled():
        made = Llama(model.config if adapter is None else merged_config(model, adapter))
    weights: Iterable[tuple[str, np.ndarray | Packed]]
    weights = merged(model, adapter) if adapter is not None else [*model.state_dict().items(), *model.named_packed()]
    own = dict(made.named_parameters())
    for name, array in weights:
        own[name].data = unpack(array) if isinstance(array, Packed) else array
    return made
