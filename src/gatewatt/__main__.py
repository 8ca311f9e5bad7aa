"""``python -m gatewatt`` is the command ``gatewatt``."""

from gatewatt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
