"""Bridges to other systems; each folder needs an extra of its own."""
