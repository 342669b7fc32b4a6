"""Questions -> answers of a model, kept as they come."""
