"""Hand questions and a model over to another harness, and take the answers back, so that one scorer judges all."""
