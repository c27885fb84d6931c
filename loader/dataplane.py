"""The whole life of an instance in the kernel: attach, apply, read, detach. Only names; each part has its own file."""

from __future__ import annotations

from loader.attach import Prepared, abandon, attach, attach_steps, foresee, lead, prepare, write_state
from loader.compile import Compiler
from loader.detach import detach
from loader.hooks import CGROUP_HOOKS, reattach
from loader.tables import SHAPES, Applied, Dataplane, netns_cookie, open_pins

__all__ = [
    "CGROUP_HOOKS",
    "SHAPES",
    "Applied",
    "Compiler",
    "Dataplane",
    "Prepared",
    "abandon",
    "attach",
    "attach_steps",
    "detach",
    "foresee",
    "lead",
    "netns_cookie",
    "open_pins",
    "prepare",
    "reattach",
    "write_state",
]
