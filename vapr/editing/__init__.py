"""Makes hard negatives of instruction data: a language model or rules edit answers, checks decide which become pairs."""
