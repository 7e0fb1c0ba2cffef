"""Adafactor for JAX, as an optax transformation.

from adafactor.optax import adafactor

optimizer = adafactor(1e-3)
state = optimizer.init(params)
updates, state = optimizer.update(grads, state, params)
params = optax.apply_updates(params, updates)
"""

from adafactor.optax.transformation import Adafactor, adafactor
from adafactor.optax.update import AdafactorState, Diagnostics

__all__ = ["Adafactor", "AdafactorState", "Diagnostics", "adafactor"]
