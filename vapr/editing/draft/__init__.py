"""One edit: which values to trade, the prompt, the checks."""
