"""Data turns films and manifests into packed batches of latents and text. It imports moc, never models."""
