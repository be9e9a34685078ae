"""Typed configuration: YAML holds the values, dataclasses beside their owners the types."""
