"""`python -m quack_lm VERB ...` is `quack-lm VERB ...`."""

from quack_lm.cli import main

if __name__ == "__main__":
    main()
