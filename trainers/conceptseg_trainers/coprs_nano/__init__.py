"""Training of coprs-nano, the embedded CoPRS checkpoint: `python -m conceptseg_trainers.coprs_nano`."""
