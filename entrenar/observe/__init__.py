"""Looking at a run from outside: what its numbers were, where one stopped being a number. Trains nothing itself."""
