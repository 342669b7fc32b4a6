"""PackedBatch to log-probs: the policy, its kernels and the caches of what it computes."""
