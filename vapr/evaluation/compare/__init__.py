"""Result folders side by side: figures, paired tests, and what changed question by question."""
