"""`python -m spdbench` is `spdbench`."""

from spdbench.cli.main import main

if __name__ == "__main__":
    main()
