"""Network namespaces without names: they end with the last socket, descriptor or process in them."""

from __future__ import annotations

from meshbpf.demo.plumbing import fresh, inside

__all__ = ["fresh", "inside"]
