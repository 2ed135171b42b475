"""Integrations with other libraries; each folder requires its own optional dependencies (an extra)."""
