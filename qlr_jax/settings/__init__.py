"""Recipe, thresholds, constraints and limits: each setting stated once, resolved once."""
