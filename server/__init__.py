"""The front end: command line, settings, and the OpenAI-compatible HTTP application."""
