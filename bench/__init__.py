"""`make bench`: what meshbpf costs, against no mesh and against other proxies, on one machine in the same minutes.

Rule of the package: deciding is pure (`stats`, `figures`, `report`), doing is apart (`machine`, `backend`, `subjects`,
`peers`, `envoy`, `load`, `openloop`, `rounds`), and `__main__` joins them. Every number printed can be recomputed from
the raw file.
"""
