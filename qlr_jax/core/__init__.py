"""The mathematics: arrays in, arrays out; no model, no files, and of JAX's world jax and numpy alone."""
