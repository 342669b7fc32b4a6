"""Language models that edit: vLLM in this process or a server."""
