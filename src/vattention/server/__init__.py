"""The online front door: an OpenAI-compatible HTTP server over `AsyncLLM`."""
