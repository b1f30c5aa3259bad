"""Fused in-place exponential moving average and reset of parameters on the CPU."""

from pkgutil import extend_path

# Run from a checkout, this folder hides the installed package that holds the compiled module: look there too.
__path__ = extend_path(__path__, __name__)

from ._ema_kernel import reset, update  # noqa: E402

__all__ = ["reset", "update"]
