"""Codecs and text encoders stand between pixels or words and what a transformer reads."""
