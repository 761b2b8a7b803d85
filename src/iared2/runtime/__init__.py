"""A reduced model without torch: adaptive batches in OpenVINO or ONNX Runtime, from the file of `iared2 export`.

Imports numpy and the runtime alone, for a server that has no torch. Nothing in a file is trusted.

Shapes: B images, N patches, P prefix tokens, S = P + N, T rows, C width, D groups, K classes.
"""

from .backends import BACKENDS
from .engine import Engine
from .values import Decide, Decided, Output

__all__ = ["BACKENDS", "Decide", "Decided", "Engine", "Output"]
