"""PreferencePair to PackedBatch: tokens, pixels, packing, the order of steps. Loads no weights."""
