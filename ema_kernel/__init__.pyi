from typing import Any

from numpy.typing import NDArray

def update(ema: NDArray[Any], policy: NDArray[Any], decay: float, threads: int = 1) -> None:
    """Move an average towards the policy, in place: ema <- ema + (1 - decay) * (policy - ema).

    Every array has one dimension, the same length, and lies contiguous in memory. Only `ema` changes.

    Args:
        ema: the average; float32, or float64 for a float64 policy.
        policy: float32, float64, float16, or bfloat16 as the uint16 array that
            `tensor.view(torch.uint16).numpy()` gives.
        decay: between 0 (the average becomes the policy) and 1 (it stays).
        threads: at most so many work on it; buffers of up to 524,288 elements stay on one.

    Raises:
        TypeError: an argument that is not an array, or has the wrong dtype.
        ValueError: a wrong shape or length, a strided or read-only array, arrays that share memory,
            `decay` or `threads` out of range.
        BufferError: another thread is inside a call with one of these arrays.

    Whatever is raised, nothing has changed. The GIL is released; calls from several threads take turns.
    """

def reset(policy: NDArray[Any], ema: NDArray[Any], init: NDArray[Any], threads: int = 1) -> None:
    """Restart from the average, in place: policy <- ema, rounded to its dtype, then ema <- init.

    Every array has one dimension, the same length, and lies contiguous in memory. `policy` and `ema` change,
    `init` does not. Rounding is to nearest, ties to even; infinities and NaN stay what they are.

    Args:
        policy: float32, float64, float16, or bfloat16 as the uint16 array that
            `tensor.view(torch.uint16).numpy()` gives.
        ema: the average; float32, or float64 for a float64 policy.
        init: what the average becomes; of the dtype of `ema`.
        threads: at most so many work on it; buffers of up to 524,288 elements stay on one.

    Raises:
        TypeError, ValueError, BufferError: as `update` does.
    """
