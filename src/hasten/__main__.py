"""`python -m hasten` is the command `hasten`."""

from hasten.cli.main import main

if __name__ == "__main__":
    main()
