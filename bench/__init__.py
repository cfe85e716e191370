"""Side-by-side measurement of decoding methods over the same prompts."""
