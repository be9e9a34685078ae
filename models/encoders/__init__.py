"""Encoders: between pixels or words and what a transformer reads: codecs and text encoders."""
