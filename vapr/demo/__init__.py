"""The embedded default: drawn scenes, a tiny policy, the whole story on a CPU."""
