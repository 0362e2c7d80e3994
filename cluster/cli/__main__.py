"""``python -m cluster.cli`` is the `sluice` command."""

from cluster.cli.app import main

main()
