"""Tool calls: how a model writes them, how its text becomes OpenAI's messages, and grammars that make it call."""
