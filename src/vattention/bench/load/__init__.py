"""Load on servers that speak OpenAI's protocol: what is sent, when, and what comes back."""
