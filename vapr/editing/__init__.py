"""Makes hard negatives: an open language model edits answers, checks decide which edits become pairs."""
