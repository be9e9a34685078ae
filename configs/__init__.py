"""Configuration is typed: dataclasses beside their owners hold types and defaults, YAML what differs from them."""
