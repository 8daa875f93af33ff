"""`python -m kvcompile`, the same as `kvcompile`."""

from kvcompile.cli import main

if __name__ == "__main__":
    main()
