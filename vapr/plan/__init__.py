"""What a run will take before anything is loaded: tokens, FLOPs, memory, time."""
