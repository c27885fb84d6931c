"""`python -m meshbpf.cli`, the same as `meshbpf`."""

from meshbpf.cli import main

main()
