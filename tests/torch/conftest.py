from quiet_torch import _quiet_torch  # noqa: F401
from torch_backends import fused  # noqa: F401
