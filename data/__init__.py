"""Data: films and manifests in, packed batches of latents and text out. Imports moc, never models."""
