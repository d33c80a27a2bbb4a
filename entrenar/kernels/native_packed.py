"""Wrappers of the C kernels that read a Packed matrix (csrc/packed.c.inc), with the names and errors of
reference_packed.py."""

from __future__ import annotations

from entrenar.kernels.reference_packed import packed_linear, packed_linear_backward, unpack, unpack_rows  # noqa: F401
