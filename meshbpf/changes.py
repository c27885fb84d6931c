"""Which services of a mesh are not those of the one before. Pure; whoever remembers something per service asks here.

A service that did not change stays the same object all the way from its source, so that identity is all there is to
compare.
"""

from __future__ import annotations

from meshbpf.model import Mesh


def places(last: Mesh, mesh: Mesh) -> list[int] | None:
    """Where in `mesh.services` they stand, and their former selves in `last.services`; None where that is not all that
    changed: services came, went or moved, or policies are others.
    """
    if len(last.services) != len(mesh.services) or last.policies != mesh.policies:
        return None
    pairs = zip(last.services, mesh.services, strict=True)
    found = [place for place, (old, new) in enumerate(pairs) if old is not new]
    return found if all(last.services[place].id == mesh.services[place].id for place in found) else None
