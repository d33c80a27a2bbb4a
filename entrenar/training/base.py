"""Which model a fine-tuning run began from: told apart by its configuration and by samples of its weights.

Hashing all of a model of many gigabytes would take longer than some runs. What is hashed of each file of weights is its
size, its header (names, shapes and places of all tensors) and SAMPLES blocks from all over it: another training of the
same shape differs in nearly every one of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from entrenar.formats import FormatError, open_regular
from entrenar.llama.pretrained import CONFIG, read_config

SAMPLES, BLOCK = 64, 1 << 12  # blocks of so many bytes
HEADER = 1 << 20  # bytes read of a header
NOT_WEIGHTS = {"optimizer.safetensors", "adapter_model.safetensors"}  # where a checkpoint of a run is the base


def identity_of(folder: Path) -> dict[str, str]:
    """A hash of the configuration and one of each file of weights, by name. Raises FormatError where it cannot be."""
    shape = json.dumps(read_config(folder).to_dict(), sort_keys=True)
    found = {CONFIG: hashlib.sha256(shape.encode()).hexdigest()}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in NOT_WEIGHTS:
            found[path.name] = _sampled(path)
    return found


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """In what two identities differ, in words."""
    told = {True: "is another", False: "is new"}
    changed = [f"{name} {told[name in wanted]}" for name, digest in found.items() if wanted.get(name) != digest]
    return changed + [f"{name} is missing" for name in wanted if name not in found]


def _sampled(path: Path) -> str:
    try:
        file, size = open_regular(path)
        with file:
            digest = hashlib.sha256(f"{size}".encode())
            digest.update(file.read(HEADER))
            for number in range(SAMPLES):
                file.seek(max(0, size - BLOCK) * number // (SAMPLES - 1))
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
