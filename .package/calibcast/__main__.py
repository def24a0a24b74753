"""`python -m calibcast`: the command line."""

from calibcast.engines.cli import main

if __name__ == "__main__":
    main()
