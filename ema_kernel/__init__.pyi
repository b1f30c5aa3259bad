from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

def update(ema: NDArray[Any], policies: Sequence[NDArray[Any]], decay: float, threads: int = 1) -> None:
    """Move an average towards the policy, in place: ema <- ema + (1 - decay) * (policy - ema).

    Every array has one dimension and lies contiguous in memory. Only `ema` changes.

    Args:
        ema: the average of all parameters, one after the other; float32, or float64 for float64 parameters.
        policies: the parameters, all of one dtype, which together are as long as `ema`: float32, float64,
            float16, or bfloat16 as the uint16 array that `tensor.view(torch.uint16).numpy()` gives. They may
            overlap each other.
        decay: between 0 (the average becomes the policy) and 1 (it stays).
        threads: at most so many work on it; up to 524,288 elements stay on one.

    Raises:
        TypeError: an argument that is not an array, or has the wrong dtype.
        ValueError: a wrong shape or length, a strided or read-only array, arrays that share memory,
            `decay` or `threads` out of range.
        BufferError: another thread is inside a call with one of these arrays.

    Whatever is raised, nothing has changed. The GIL is released; calls from several threads take turns.
    """

def reset(policies: Sequence[NDArray[Any]], ema: NDArray[Any], init: NDArray[Any], threads: int = 1) -> None:
    """Restart from the average, in place: policy <- ema, rounded to its dtype, then ema <- init.

    Every array has one dimension and lies contiguous in memory. `policies` and `ema` change, `init` does not.
    Rounding is to nearest, ties to even; infinities and NaN stay what they are.

    Args:
        policies: the parameters, as `update` takes them; none may share memory with another.
        ema: the average of all parameters, one after the other; float32, or float64 for float64 parameters.
        init: what the average becomes; of the policies' dtype, as long as `ema`.
        threads: at most so many work on it; up to 524,288 elements stay on one.

    Raises:
        TypeError, ValueError, BufferError: as `update` does.
    """
