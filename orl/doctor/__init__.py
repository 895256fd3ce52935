"""Whether a run is sound, what mends it, and what of it can be removed."""
