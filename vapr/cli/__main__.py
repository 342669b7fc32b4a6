"""``python -m vapr.cli``."""

from vapr.cli.main import main

main()
