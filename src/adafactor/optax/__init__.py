"""Adafactor for JAX, as an optax transformation.

from adafactor.optax import adafactor

optimizer = adafactor(1e-3)
state = optimizer.init(params)
updates, state = optimizer.update(grads, state, params)
params = optax.apply_updates(params, updates)
"""

from adafactor.optax.state import AdafactorState, Diagnostics
from adafactor.optax.transformation import Adafactor, adafactor

__all__ = ["Adafactor", "AdafactorState", "Diagnostics", "adafactor"]
