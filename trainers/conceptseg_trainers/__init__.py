"""Training of ConceptSeg. `conceptseg_trainers.nano` trains the embedded checkpoint."""

import conceptseg_hf as conceptseg_hf  # before transformers: it makes torchvision importable beside a CPU torch
