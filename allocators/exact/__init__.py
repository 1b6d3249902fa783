"""The exact allocation: hull, dynamic programming, search, and the proof of the bound."""
