"""The server: OpenAI's chat API over one engine, and a page to ask at."""
