from quiet_torch import _quiet_torch  # noqa: F401
