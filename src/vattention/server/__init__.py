"""The online front door: an OpenAI-compatible endpoint over `AsyncLLM`. Needs the extra `server`."""
