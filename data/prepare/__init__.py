"""This package prepares a cache to train on from a folder of videos or a manifest."""
