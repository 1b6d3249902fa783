"""`python -m qlr_jax.cli`."""

from qlr_jax.cli import main

main()
