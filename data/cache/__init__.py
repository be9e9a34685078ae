"""The cache of prepared latents and text: its writer and its reader."""
