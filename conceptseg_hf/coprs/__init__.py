"""CoPRS: a positional prior, visible as a heatmap, between the reasoning of a VLM and the mask decoder of SAM.

The VLM ends its reasoning with the concentration token `<REF_POS>`. The hidden state of this token is the query of an
attention over SAM's image features, which gives the positional prior, and SAM's mask decoder refines the prior to a
mask (CoPRS: Learning Positional Prior from Chain-of-Thought for Reasoning Segmentation).
"""

from .configuration_coprs import CoPRSConfig
from .modeling_coprs import CoPRSForSegmentation
from .outputs import CoPRSOutput
from .processing_coprs import CoPRSProcessor

__all__ = ["CoPRSConfig", "CoPRSForSegmentation", "CoPRSOutput", "CoPRSProcessor"]
