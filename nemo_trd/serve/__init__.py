"""Being a vLLM server."""
