"""Trains conceptseg-nano, the embedded checkpoint, from scratch on ConceptShapes: `python -m conceptseg_trainers.nano`."""
