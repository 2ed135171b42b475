"""Training of conceptseg-nano, the embedded checkpoint, on ConceptShapes: `python -m conceptseg_trainers.nano`."""
