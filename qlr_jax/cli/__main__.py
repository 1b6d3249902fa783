"""`python -m qlr_jax.cli`."""

from qlr_jax.cli import main

if __name__ == "__main__":  # processes that a cluster starts here import this too
    main()
