"""Preparing: from a folder of videos or a manifest to a cache to train on."""
