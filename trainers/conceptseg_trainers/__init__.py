"""Training of ConceptSeg. `conceptseg_trainers.nano` trains the embedded checkpoint."""

import conceptseg_hf as conceptseg_hf  # first of all: it makes torchvision importable beside a CPU build of torch
