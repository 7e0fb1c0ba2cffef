"""What training will need, before training: shapes in, bytes out. Imports no framework."""

from adafactor.planning.host import Host, on_host
from adafactor.planning.optimizers import Adafactor, AdamW8bit, Optimizer, TorchAdafactor, TorchAdamW
from adafactor.planning.parameters import Parameter
from adafactor.planning.usage import Plan, Usage, plan

__all__ = [
    "Adafactor",
    "AdamW8bit",
    "Host",
    "Optimizer",
    "Parameter",
    "Plan",
    "TorchAdafactor",
    "TorchAdamW",
    "Usage",
    "on_host",
    "plan",
]
