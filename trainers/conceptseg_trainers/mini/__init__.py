"""Training of conceptseg-mini, a small checkpoint for photographs."""
