"""Makes hard negatives of instruction data: a model or rules edit answers, checks decide which become pairs."""
