"""English and categories without a model: reading answers, nouns, agreement, word sense."""
