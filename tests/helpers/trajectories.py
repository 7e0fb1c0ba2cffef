"""The oracle beside an implementation: where both start, which gradients they get, how far apart they may be.

An implementation takes ``start``, then steps along each ``next_gradient()`` and shows what it holds to ``check``.
Options have the names of ``Hyperparameters`` and of ``AROUND``; a front end's tests translate them.
"""

import ml_dtypes
import numpy as np
from tolerances import ONE_ROUNDING, TOLERANCES

from adafactor import Factored, Hyperparameters
from adafactor import layout as layout_of
from adafactor.core import reference

OPTIONS = {
    "default": {},
    "constant learning rate": {"relative_step": False, "scale_parameter": False, "learning_rate": 1e-3},
    "always": {"relative_step": "always", "learning_rate": 1.0},
    "momentum": {"beta_1": 0.9},
    "weight decay": {"weight_decay": 0.1},
    "no clipping": {"clip_threshold": None},
    "tight clipping": {"clip_threshold": 0.25},
    "fixed beta2": {"beta_2_max": 0.5},
    "decay and epsilons": {"beta_2_decay": -0.5, "epsilon_1": 1e-3, "epsilon_2": 1e-1},
    "maximize": {"maximize": True, "beta_1": 0.5, "weight_decay": 0.01},
}
#: For a parameter of rank 4.
LAYOUTS = {
    "largest_two": "largest_two",
    "smallest": "smallest",
    "none": lambda name, shape: None,
    "first and last": lambda name, shape: Factored(rows=(0,), columns=(3,)),
    "transposed": lambda name, shape: Factored(rows=(3,), columns=(0,)),
    "interleaved": lambda name, shape: Factored(rows=(1, 3), columns=(0, 2)),
    "batch": lambda name, shape: Factored(rows=(2,), columns=(3,), batch=(0,)),
    "batch and stack": lambda name, shape: Factored(rows=(3,), columns=(2,), batch=(1,)),
    "batch, unfactored": lambda name, shape: Factored(batch=(0, 2)),
    "all batch": lambda name, shape: Factored(batch=(0, 1, 2, 3)),
}
#: Around the step, beside ``Hyperparameters``: with their defaults here.
AROUND = {
    "learning_rate": 1e-2, "weight_decay": 0.0, "maximize": False,
    "factoring": "last_two", "min_dim_size_to_factor": 1,
}  # fmt: skip


class Trajectory:
    """One parameter of ``dtype`` that ``implementation``, a row of ``TOLERANCES``, steps."""

    def __init__(self, implementation, shape, dtype, options):
        self.tolerance, self.dtype = TOLERANCES[implementation][dtype], np.dtype(getattr(ml_dtypes, dtype, dtype))
        self.around = {name: options.get(name, value) for name, value in AROUND.items()}
        layout = layout_of(shape, self.around["factoring"], self.around["min_dim_size_to_factor"])
        numbers = {name: value for name, value in options.items() if name not in AROUND}
        self.oracle = reference.Adafactor(layout, Hyperparameters(**numbers))
        self.rng = rng = np.random.default_rng(0)
        # Rows and columns of very different size, and a column without gradient.
        self.scale = np.exp(rng.normal(size=shape) * 0.1)
        for axis, n in enumerate(shape):
            spread = np.exp((1 if dtype == "float16" else 3) * rng.normal(size=n))
            self.scale = self.scale * np.expand_dims(spread, [a for a in range(len(shape)) if a != axis])
        if len(shape) >= 2 and shape[-1] > 2:
            self.scale[..., 1] = 0
        self.start = np.asarray(rng.normal(size=shape)).astype(self.dtype)
        self.x = self.start.astype(np.float64)
        self.worst = 0.0  # share of what is allowed

    def next_gradient(self):
        """Of the parameter's dtype. The oracle takes its step: RMS(x) before the weight decay."""
        g = np.asarray(self.rng.normal(size=self.x.shape) * self.scale).astype(self.dtype)
        rate, decay = self.around["learning_rate"], self.around["weight_decay"]
        sign = -1 if self.around["maximize"] else 1
        self.x = self.oracle.step(self.x, sign * g.astype(np.float64), rate) - rate * decay * self.x
        return g

    def check(self, stored):
        """That the parameter after the step is the oracle's; one that is rounded goes on from what is stored."""
        stored = np.asarray(stored).astype(np.float64)
        assert stored.shape == self.x.shape
        largest, error = max(np.abs(self.x).max(), 1e-30), np.abs(stored - self.x)
        allowed = self.tolerance * largest if self.tolerance != ONE_ROUNDING else self._rounding(largest)
        self.worst = max(self.worst, float((error / allowed).max()))
        assert self.worst <= 1, (self.x.shape, self.dtype, self.around)
        if self.tolerance == ONE_ROUNDING:
            self.x = stored

    def _rounding(self, largest):
        """To nearest, of what float32 arithmetic is a little off."""
        return 0.5001 * float(ml_dtypes.finfo(self.dtype).eps) * np.abs(self.x) + 1e-6 * largest

    def check_state(self, steps, state):
        """That the step and the statistics are the oracle's, and float32, float64 for a float64 parameter."""
        assert steps == self.oracle.state.t
        wide = self.dtype == np.float64
        for name, value in self.oracle.state.second_moment.items():
            assert np.asarray(state[name]).dtype == (np.float64 if wide else np.float32)
            np.testing.assert_allclose(np.asarray(state[name]), value, rtol=1e-12 if wide else 4e-6)
