"""What this machine can do for a run and what is missing, and whether its devices give the right numbers."""
