"""This package writes and reads the cache of prepared latents and text."""
