"""Language models behind an OpenAI-compatible server: requests, replies, and the only door to the openai package."""
